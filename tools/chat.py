"""`kvtier chat`: talk to a local checkpoint. The session is parked at the end and goes on by its id the next time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams, Session

from ..engine.attending import Attention
from ..engine.loading import load_checkpoint
from ..engine.template import end_tokens
from ..tiers.errors import ConfigError, KvTierError
from ..tiers.layout import format_bytes
from .format_flags import given_formats

_HELP = "/fork  /rollback N  /park  /resume  /stats  /help  /quit"


def run_chat(arguments: argparse.Namespace) -> int:
    """Returns 0 at the end of input. Raises ConfigError for a checkpoint or settings that cannot be used."""
    config = PagerConfig(
        device_bytes=arguments.device_bytes,
        host_bytes=arguments.host_bytes,
        nvme_path=arguments.store,
        nvme_bytes=arguments.nvme_bytes,
        nvme_codec=arguments.nvme_codec,
        **given_formats(arguments),
    )
    params: dict[str, Any] = dict(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        attention=Attention.parse(arguments.attention),
    )
    SamplingParams(**params)  # refuse bad values before anything is loaded
    config.validate()
    model, tokenizer = load_checkpoint(arguments.model, arguments.dtype)
    if tokenizer is None:
        raise ConfigError(f"--model {arguments.model!r} has no tokenizer; chat needs one saved beside the weights")
    attention = Attention.parse(arguments.attention)
    with Engine.from_model(model, config, tokenizer, attention=attention, pager=arguments.pager) as engine:
        ends = end_tokens(model, tokenizer)
        _Chat(engine, arguments.session, SamplingParams(**params, stop_token_ids=ends)).run()
    return 0


class _Chat:
    """The conversation at the terminal; commands start with a slash."""

    def __init__(self, engine: Engine, session_id: str, params: SamplingParams) -> None:
        self._engine, self._params = engine, params
        self._session: Session = engine.session(session_id)

    def run(self) -> None:
        _say(f"session {self._session.id!r}: {len(self._session.token_ids)} tokens known. {_HELP}")
        for line in _lines():
            if line == "/quit":
                break
            try:
                if line.startswith("/"):
                    self._command(*line.split())
                elif line:
                    self._turn(line)
            except KvTierError as error:  # a turn that cannot be is no reason to lose the session
                _say(f"error: {error}")
        if not self._session.is_parked and self._session.token_ids:
            self._session.park()

    def _turn(self, text: str) -> None:
        from transformers import TextStreamer

        engine, session = self._engine, self._session.resume()
        streamer: Any = TextStreamer(engine.tokenizer, skip_special_tokens=True)

        def show(token: int) -> None:
            if token not in self._params.stop_token_ids:
                streamer.put(_tensor(token))

        out = session.send(text, self._params, on_token=show)
        usage, read = out.usage, out.selection
        streamer.end()
        _say(
            f"[{usage.cached_tokens} tokens cached: {usage.device_tokens} on device, {usage.host_tokens} on host, "
            f"{usage.disk_tokens} on disk; {usage.completion_tokens} new; first token after {usage.ttft_s:.2f} s]"
        )
        if read is not None and read.steps:
            _say(
                f"[{100 * read.share_read:.1f} % of the pages read in {read.steps} steps, {format_bytes(read.bytes_fetched)} "
                f"fetched; at most {read.left_out_bound:.2g} of any head's weight left out]"
            )

    def _command(self, verb: str, *rest: str) -> None:
        session = self._session
        if verb == "/park" and not rest:
            session.park()
            _say(f"session {session.id!r} is parked")
        elif verb == "/resume" and not rest:
            session.resume()
        elif verb == "/fork" and not rest:
            (self._session,) = session.resume().fork()
            _say(f"now in session {self._session.id!r}; {session.id!r} is parked as it was")
            session.park()
        elif verb == "/rollback" and len(rest) == 1 and rest[0].isdecimal():
            session.rollback(int(rest[0]))
            _say(f"{len(session.token_ids)} tokens known")
        elif verb == "/stats" and not rest:
            for name, tier in self._engine.pager.status()["tiers"].items():
                _say(f"{name}: {format_bytes(tier['used_bytes'])} of {format_bytes(tier['capacity_bytes'])}")
        else:
            _say(("" if verb == "/help" else f"unknown command {' '.join([verb, *rest])!r}; ") + _HELP)


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tensor(token: int) -> Any:
    import torch

    return torch.tensor([token])
