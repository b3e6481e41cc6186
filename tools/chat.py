"""`kvtier chat`: talk to a local checkpoint. The session is parked at the end and goes on by its id the next time."""

from __future__ import annotations

import argparse
import sys

from kvtier import Engine, PagerConfig, SamplingParams, Session

from ..tiers.errors import ConfigError

_HELP = "/park  /resume  /rollback N  /stats  /quit"


def run_chat(arguments: argparse.Namespace) -> int:
    config = PagerConfig(
        device_bytes=arguments.device_bytes, host_bytes=arguments.host_bytes, nvme_path=arguments.store
    )
    with Engine.from_pretrained(arguments.model, config) as engine:
        session = engine.session(arguments.session)
        print(f"session {session.id!r}: {len(session.token_ids)} tokens known. {_HELP}", file=sys.stderr)
        end = engine.tokenizer.eos_token_id
        params = SamplingParams(max_tokens=arguments.max_tokens, stop_token_ids=() if end is None else (end,))
        for line in sys.stdin:
            text = line.rstrip("\n")
            if text == "/quit":
                break
            if text.startswith("/"):
                _command(engine, session, text)
            elif text:
                _turn(engine, session, text, params)
        if not session.is_parked and session.token_ids:
            session.park()
    return 0


def _turn(engine: Engine, session: Session, text: str, params: SamplingParams) -> None:
    session.resume()
    shown: list[int] = []

    def show(token: int) -> None:
        before = engine.tokenizer.decode(shown)
        shown.append(token)
        print(engine.tokenizer.decode(shown)[len(before) :], end="", flush=True)

    usage = session.send(text, params, on_token=show).usage
    print()
    print(f"[{usage.cached_tokens} cached, first token after {usage.ttft_s:.2f} s]", file=sys.stderr)


def _command(engine: Engine, session: Session, text: str) -> None:
    verb, *rest = text.split()
    try:
        if verb == "/park":
            session.park()
        elif verb == "/resume":
            session.resume()
        elif verb == "/rollback" and rest and rest[0].isdigit():
            session.rollback(int(rest[0]))
        elif verb == "/stats":
            for name, tier in engine.pager.status()["tiers"].items():
                print(f"{name}: {tier['used_bytes']:,} of {tier['capacity_bytes']:,} bytes", file=sys.stderr)
        else:
            print(f"unknown command {verb!r}; {_HELP}", file=sys.stderr)
    except ConfigError as error:
        print(f"{verb}: {error}", file=sys.stderr)
