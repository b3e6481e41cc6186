"""`kvtier replay TRACE`: what each policy would have hit at each capacity, and what other tiers would buy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...pager.policies.registry import NAMES
from ...tiers.errors import ConfigError
from .model import Machine, changed, split_of

_DESCRIPTION = """Replays a request trace through the pager's policies, with the trace's own times.

A trace has one JSON object per line, plain or gzip (Mooncake's format): hash_ids, one id per block of the prompt, equal
where the prompts are equal up to the end of this block; and, where known, timestamp (ms), input_length and output_length
(tokens). Lines need not be sorted. Times that are missing are a second apart, lengths that are missing are whole blocks.
release: true (ours) says that the chain will not be used again. --convert makes this format of token ids or text.

A capacity of 5% is 5 % of the footprint, the number of distinct blocks in the trace, as blocks and rounded down (one at
least); a plain number is blocks. A request hits the longest prefix of its blocks that is held, at most its input_length
tokens; then all its blocks are held and the policy says who leaves. token_hit_rate is tokens hit over tokens asked for.
"belady" hits the most blocks that any policy could; where prompts end in nearly empty blocks another may hit more tokens.
"importance" is lru here, for a trace has no attention mass. What is called modelled follows from the rates given below.

--prefetch replays each cell twice in virtual time, by demand alone and with what waits in the queue and next turns of
sessions brought up before: mean waits for blocks, and the share of prefetched bytes that nobody read. Give rates at
which one server keeps up with the trace; else its queue grows without end and hides every copy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = _DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("trace", metavar="TRACE", help="JSON lines, plain or gzip")
    parser.add_argument(
        "--policy",
        default="auto,lru,arc",
        metavar="NAME,..",
        help=f"all, or of {', '.join(NAMES)} (default auto,lru,arc)",
    )
    parser.add_argument(
        "--capacity", default="1%,5%,10%,20%,50%", metavar="C,..", help="as 5%% or blocks (default %(default)s)"
    )
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="tokens per id (default: worked out from the lengths)"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N lines")
    parser.add_argument("--window", type=int, metavar="N", help="tokens, for sliding_window")
    parser.add_argument("--sinks", type=int, default=4, metavar="N", help="tokens, for sliding_window (default 4)")
    parser.add_argument("--no-belady", action="store_true", help="leave out the offline bound")
    parser.add_argument(
        "--releases", action="store_true", help="tell policies, when a request ends, what is never used again"
    )
    parser.add_argument(
        "--tiers",
        metavar="T=S,..",
        help="split of a capacity, as device=10%%,host=40%% (default: all of it is one tier, nvme)",
    )
    parser.add_argument(
        "--what-if", metavar="T=F,..", help="also with other tiers, as host=2x,nvme=0 (implies --tiers)"
    )
    parser.add_argument(
        "--prefetch", action="store_true", help="also in time: waits with prefetch and without (implies --tiers)"
    )
    parser.add_argument("--bytes-per-token", type=int, default=Machine.bytes_per_token, metavar="N", help="of K and V")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=Machine.prefill_tokens_per_s, metavar="N")
    parser.add_argument("--host-bytes-per-s", type=float, default=Machine.host_bytes_per_s, metavar="N")
    parser.add_argument("--nvme-bytes-per-s", type=float, default=Machine.nvme_bytes_per_s, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="charts and table as one page that loads nothing")
    parser.add_argument("--png", type=Path, metavar="FILE", help="charts as a picture (needs matplotlib)")
    parser.add_argument(
        "--convert", type=Path, metavar="FILE", help="TRACE has tokens or prompt per line: write FILE instead"
    )
    parser.set_defaults(run=run_replay)


def run_replay(arguments: argparse.Namespace) -> int:
    """Raises: ConfigError."""
    from . import cells, trace

    _check(arguments)
    if arguments.convert is not None:
        from .convert import convert

        written = convert(Path(arguments.trace), arguments.convert, arguments.block_size or 512)
        print(f"{written} requests in {arguments.convert}")
        return 0
    read = trace.read(Path(arguments.trace), arguments.block_size, arguments.requests)
    if not read.chains:
        raise ConfigError(f"trace {arguments.trace!r} holds no request; give one JSON object with hash_ids per line")
    with _progress(enabled=not arguments.json) as show:
        rows = [row for plan in _plans(arguments, read) for row in cells.run(read, plan, show)]
    _tell(arguments, read, rows)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("block_size", "requests", "window"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if arguments.png is not None:
        from ..bench.serving.chart import check_png

        check_png()


def _plans(arguments: argparse.Namespace, read: Any) -> list[Any]:
    from .cells import Plan, capacities_of, policies_of

    machine = Machine(
        arguments.bytes_per_token,
        arguments.prefill_tokens_per_s,
        arguments.host_bytes_per_s,
        arguments.nvme_bytes_per_s,
    )
    split = arguments.tiers or ("device=10%,host=40%" if arguments.what_if or arguments.prefetch else "device=0")
    plan = Plan(
        policies=policies_of(arguments.policy, arguments.window),
        capacities=capacities_of(arguments.capacity, read),
        shares=split_of(split),
        machine=machine,
        has_bound=not arguments.no_belady,
        has_releases=arguments.releases,
        window=arguments.window,
        sinks=arguments.sinks,
        has_prefetch=arguments.prefetch,
    )
    if not arguments.what_if:
        return [plan]
    return [plan, replace(plan, shares=changed(plan.shares, arguments.what_if), case=arguments.what_if)]


def _tell(arguments: argparse.Namespace, read: Any, rows: list[dict[str, Any]]) -> None:
    from . import draw

    facts = {
        "trace": read.name,
        "requests": len(read.chains),
        "references": read.num_references,
        "footprint_blocks": read.footprint,
        "block_tokens": read.block_tokens,
        "input_tokens": read.total_tokens,
    }
    head = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    draw.save_charts(rows, head, arguments.html, arguments.png)
    if arguments.json:
        print(json.dumps({**facts, "rows": rows}))
    else:
        draw.show(head, rows)


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not enabled or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task: Any = bars.add_task("replay", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
