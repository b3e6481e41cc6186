"""The grammar of `pager-inspect`: verbs, flags, exit codes. Which question a verb asks is in verbs.py.

Exit codes: 0 fine, 1 findings (check, doctor, status --exit-code), 2 usage, 3 nothing answers there, 4 no whole answer in
time, 5 another protocol version, 130 interrupted. Results go to stdout, talk to stderr, a closed pipe is quiet.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ...pager.inspection.asking import (
    ConfigError,
    KvTierError,
    ProtocolError,
    Target,
    TimedOutError,
    UnreachableError,
)
from . import verbs
from .text import style_for

USAGE, UNREACHABLE, INCOMPLETE, OTHER_VERSION, INTERRUPTED = 2, 3, 4, 5, 130
EXAMPLES = """examples:
  pager-inspect                            is all well? (the verb is `status`)
  pager-inspect -s /data/kv-store top      live, by session
  pager-inspect why --slowest 5            where did the time to first token go?
  pager-inspect prefix prompt-ids.txt      how far would this prompt hit?
  pager-inspect doctor --json | jq .       findings, for programs

sizes are binary (1.5G is 1.5 GiB); keys are shown by their first eight digits, token text never"""


class Parser(argparse.ArgumentParser):
    """Says what was meant by a mistyped verb."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message:
            from difflib import get_close_matches

            word = message.split("invalid choice: ")[1].split(" (")[0].strip("'\"")
            choices = [name for action in self._actions if action.choices for name in map(str, action.choices)]
            close = get_close_matches(word, choices, 1)
            message = f"{word!r} is unknown" + (
                f"; did you mean {close[0]!r}?" if close else f"; choose {', '.join(choices)}"
            )
        print(f"{self.prog}: error: {message}\n{self.format_usage().rstrip()}", file=sys.stderr)
        raise SystemExit(USAGE)


def parser() -> argparse.ArgumentParser:
    """The whole grammar; completion is made from it."""
    common = Parser(add_help=False)
    common.add_argument("-s", "--socket", metavar="SOCKET|PATH", help="a pager's socket, or the directory of its store")
    common.add_argument(
        "-j", "--json", action="store_true", help="one JSON object; one per line where there are several"
    )
    common.add_argument("--no-color", action="store_true", help="no colour (as NO_COLOR does)")
    common.add_argument("--ascii", action="store_true", help="no characters beyond ASCII")
    common.add_argument("--timeout", type=float, metavar="SEC", help="how long to wait for an answer (default 2)")
    common.add_argument(
        "--model", type=int, metavar="N", help="of a daemon with several models open (`status` lists them)"
    )
    for action in common._actions:  # given before the verb or after it
        action.default = argparse.SUPPRESS
    top = Parser(
        prog="pager-inspect",
        description="Look at a running pager or at a store at rest. Changes nothing.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    commands = top.add_subparsers(metavar="VERB", dest="verb", parser_class=Parser)
    for verb in verbs.VERBS:
        sub = commands.add_parser(verb.name, help=verb.help, description=verb.help, parents=[common])
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    if arguments.verb is None:
        arguments = parser().parse_args([*words, "status"])
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except KvTierError as error:
        print(f"pager-inspect: error: {error}", file=sys.stderr)
        return _code_of(error)


def _run(arguments: argparse.Namespace) -> int:
    where = getattr(arguments, "target", None) or getattr(arguments, "socket", None)
    context = verbs.Context(
        target=lambda: _found(arguments, where),
        style=style_for(
            sys.stdout,
            os.environ,
            no_color=getattr(arguments, "no_color", False),
            ascii_only=getattr(arguments, "ascii", False),
        ),
        as_json=getattr(arguments, "json", False),
        arguments=arguments,
    )
    code: int = arguments.run(context)
    return code


def _found(arguments: argparse.Namespace, where: str | None) -> Target:
    target = Target.find(where, timeout_s=getattr(arguments, "timeout", None) or 2.0)
    target.model = getattr(arguments, "model", None)
    return target


def _code_of(error: KvTierError) -> int:
    if isinstance(error, UnreachableError):
        return UNREACHABLE
    if isinstance(error, TimedOutError):
        return INCOMPLETE
    if isinstance(error, ProtocolError):
        return OTHER_VERSION
    return USAGE if isinstance(error, ConfigError) else INCOMPLETE
