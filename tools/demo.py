"""The demo: one needle chat whose KV fits in no memory tier, through device, host and a Zarr store, and a restart.

Every answer is checked, before and after the pager was ended and opened again from disk. Live bars go to stderr on a
terminal; stdout gets the table, or with --json one object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from ..tiers.errors import ConfigError
from ..tiers.layout import format_bytes, parse_bytes
from .format_flags import given_formats

KV_BYTES_PER_TOKEN = {"float32": 2048, "bfloat16": 1024}  # 2 layers x (K + V) x 2 heads x 64, per token
DEVICE_SHARE, HOST_SHARE = 10, 30  # per cent of the context's KV
VALUE_TOKENS = 4
SESSION = "demo"
_PROMOTE = ("host_to_device", "nvme_to_host")
_DEMOTE = ("device_to_host", "host_to_nvme")


def run_demo(arguments: argparse.Namespace) -> int:
    """Returns 0 when every answer was right, else 1. Raises ConfigError for settings that cannot be."""
    _check(arguments)
    with _store(arguments.store) as path:
        result = _Demo(arguments, path).run()
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    asked = result["needles_asked"]
    return 0 if result["needles_exact"] == result["needles_exact_after_restart"] == asked else 1


def _check(arguments: argparse.Namespace) -> None:
    if arguments.dtype not in KV_BYTES_PER_TOKEN:
        raise ConfigError(f"--dtype {arguments.dtype!r} is unknown; choose {' or '.join(KV_BYTES_PER_TOKEN)}")
    least = arguments.needles * (VALUE_TOKENS + 2) + 2
    if arguments.needles < 1 or arguments.context < max(64, least):
        raise ConfigError(
            f"--context {arguments.context} with --needles {arguments.needles}: need at least {least} tokens"
        )
    if arguments.device_blocks is not None and arguments.device_blocks < 1:
        raise ConfigError(f"--device-blocks {arguments.device_blocks}: the device tier needs at least a few blocks")


@contextlib.contextmanager
def _store(path: str | None) -> Iterator[Path]:
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-") as temporary:
        yield Path(temporary) / "store"


class _Demo:
    """One run; `run` returns the result object."""

    def __init__(self, arguments: argparse.Namespace, path: Path) -> None:
        import torch

        from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt

        self.arguments = arguments
        self.kv_bytes = arguments.context * KV_BYTES_PER_TOKEN[arguments.dtype]
        self.block_size = arguments.block_size
        self.config = self._config(path)
        self.model = build_needle_model(dtype=getattr(torch, arguments.dtype))
        self.ids, self.needles = needle_prompt(
            NeedleSpec(), arguments.context, arguments.needles, num_values=VALUE_TOKENS, seed=arguments.seed
        )
        self.margin = float("inf")
        self.totals: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.formats: dict[str, str] = {}
        self.screen = _Screen(enabled=not arguments.json)

    def _config(self, path: Path) -> PagerConfig:
        device = self.kv_bytes * DEVICE_SHARE // 100
        if self.arguments.device_bytes is not None:
            device = parse_bytes(self.arguments.device_bytes, name="--device-bytes")
        if self.arguments.device_blocks is not None:
            self.block_size = self.block_size or 256
            token_bytes = KV_BYTES_PER_TOKEN[self.arguments.dtype]
            device = self.arguments.device_blocks * self.block_size * token_bytes
        host = self.kv_bytes * HOST_SHARE // 100
        if self.arguments.host_bytes is not None:
            host = parse_bytes(self.arguments.host_bytes, name="--host-bytes")
        return PagerConfig(
            device_bytes=device,
            host_bytes=host,
            nvme_path=path,
            nvme_bytes=self.arguments.nvme_bytes or 2 * self.kv_bytes + (64 << 20),
            nvme_codec=self.arguments.nvme_codec,
            **given_formats(self.arguments),
            backend="auto",
        )

    def run(self) -> dict[str, Any]:
        started_s = time.perf_counter()
        with self._engine() as engine:
            if SESSION in engine.pager.sessions():
                engine.pager.forget(SESSION)
            session = engine.session(SESSION)
            prefill_s = self._fill(engine, session)
            exact = self._ask(engine, session, "asking")
            session.park()
            self._collect(engine)
        resumed_s = time.perf_counter()
        with self._engine() as engine:
            session = engine.session(SESSION)
            length = len(session.token_ids)
            recomputed = length - session.num_computed
            session.send([self.needles[0].key], SamplingParams(max_tokens=1))
            resume_ttft_s = time.perf_counter() - resumed_s
            session.rollback(length)
            exact_after = self._ask(engine, session, "asking after the restart")
            recomputed += int(engine.pager.counters.get("lost_tokens"))
            self._collect(engine)
        self.screen.close()
        return self._result(exact, exact_after, recomputed, prefill_s, resume_ttft_s, time.perf_counter() - started_s)

    def _engine(self) -> Engine:
        return Engine.from_model(self.model, self.config, block_size=self.block_size)

    def _fill(self, engine: Engine, session: Any) -> float:
        from kvtier.engine.needle_check import build_needle_cache

        started_s = time.perf_counter()
        engine.progress = lambda done, total: self.screen.show("prefill", done, total, engine.pager.status())
        if self.arguments.fast_fill:
            session.inject(self.ids, build_needle_cache(self.model, self.ids))
        else:
            session.send(self.ids, SamplingParams(max_tokens=0))
        engine.progress = None
        return time.perf_counter() - started_s

    def _ask(self, engine: Engine, session: Any, what: str) -> int:
        exact, length = 0, len(session.token_ids)
        for number, needle in enumerate(self.needles):
            out = session.send([needle.key], SamplingParams(max_tokens=VALUE_TOKENS, top2_margin=True))
            exact += tuple(out.token_ids) == tuple(needle.values)
            self.margin = min(self.margin, *out.margins)
            session.rollback(length)
            self.screen.show(what, number + 1, len(self.needles), engine.pager.status())
        return exact

    def _collect(self, engine: Engine) -> None:
        """Add up counters and peaks over both lives of the pager."""
        status = engine.pager.status()
        for row in status["counters"]:
            direction = row["labels"].get("direction", row["labels"].get("tier", ""))
            name = f"{row['name']}:{direction}"
            self.totals[name] = self.totals.get(name, 0) + row["value"]
        for tier, levels in status["tiers"].items():
            used = levels["used_bytes"] if tier == "nvme" else levels["peak_bytes"]
            self.peaks[tier] = max(self.peaks.get(tier, 0), used)
            self.peaks[f"{tier}_capacity"] = levels["capacity_bytes"]
            self.peaks[f"{tier}_blocks"] = levels["blocks"]
            self.formats[tier] = ", ".join(levels["formats"])

    def _moved(self, what: str, directions: tuple[str, ...]) -> int:
        return int(sum(self.totals.get(f"{what}:{direction}", 0) for direction in directions))

    def _result(
        self, exact: int, after: int, recomputed: int, prefill_s: float, resume_ttft_s: float, total_s: float
    ) -> dict[str, Any]:
        slices = self._moved("moved_slices", _PROMOTE) // 2  # the model has two layers
        moves = (*_PROMOTE, *_DEMOTE)
        return {
            "context_tokens": len(self.ids),
            "needles_asked": len(self.needles),
            "needles_exact": exact,
            "needles_exact_after_restart": after,
            "min_margin_nats": round(self.margin, 4),
            "kv_bytes": self.kv_bytes,
            "device_bytes": self.peaks["device"],
            "device_cap_bytes": self.config.device_size,
            "host_bytes": self.peaks["host"],
            "host_cap_bytes": self.config.host_size,
            "nvme_bytes": self.peaks["nvme"],
            "formats": self.formats,
            "promoted_blocks": self._moved("moved_blocks", _PROMOTE) + slices,
            "demoted_blocks": self._moved("moved_blocks", _DEMOTE),
            "moved_bytes": {direction: self._moved("moved_bytes", (direction,)) for direction in moves},
            "read_blocks": {t: int(self.totals.get(f"read_blocks:{t}", 0)) for t in ("device", "host", "nvme")},
            "hit_tokens": {t: int(self.totals.get(f"hit_tokens:{t}", 0)) for t in ("device", "host", "nvme")},
            "blocks_at_end": {t: self.peaks[f"{t}_blocks"] for t in ("device", "host", "nvme")},
            "recomputed_tokens_after_restart": recomputed,
            "fill": "fast" if self.arguments.fast_fill else "prefill",
            "prefill_s": round(prefill_s, 3),
            "resume_ttft_s": round(resume_ttft_s, 3),
            "total_s": round(total_s, 3),
        }


class _Screen:
    """Live bars on a terminal, a line every tenth elsewhere."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._live: Any = None
        self._last = (-1, "")

    def show(self, what: str, done: int, total: int, status: dict[str, Any]) -> None:
        if not self._enabled:
            return
        if not sys.stderr.isatty():
            step = (done * 10 // total, what)
            if step != self._last:
                self._last = step
                print(f"{what}: {done}/{total}  {_levels(status)}", file=sys.stderr, flush=True)
            return
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            from rich.console import Console

            self._live = Live(console=Console(stderr=True), refresh_per_second=8)
            self._live.start()
        lines = [f"{what:<24} {_bar(done, total)} {done}/{total}"]
        for name, tier in status["tiers"].items():
            used, capacity = tier["used_bytes"], tier["capacity_bytes"]
            lines.append(f"{name:<24} {_bar(used, capacity)} {format_bytes(used)} of {format_bytes(capacity)}")
        self._live.update(Text("\n".join(lines)))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _bar(done: float, total: float, width: int = 40) -> str:
    filled = int(width * done / max(total, 1))
    return "█" * filled + "░" * (width - filled)


def _levels(status: dict[str, Any]) -> str:
    return "  ".join(f"{name} {format_bytes(tier['used_bytes'])}" for name, tier in status["tiers"].items())


def _print_table(r: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{r['context_tokens']:,} tokens through three tiers", show_header=False)
    share = 100 * r["device_bytes"] / r["kv_bytes"]
    reads = max(1, sum(r["read_blocks"].values()))
    rows = [
        ("answers right", f"{r['needles_exact']} of {r['needles_asked']}"),
        ("after the restart", f"{r['needles_exact_after_restart']} of {r['needles_asked']}"),
        ("smallest margin", f"{r['min_margin_nats']} nats"),
        ("whole KV cache", format_bytes(r["kv_bytes"])),
        ("device tier, peak", f"{format_bytes(r['device_bytes'])} ({share:.1f} % of the KV)"),
        ("host tier, peak", format_bytes(r["host_bytes"])),
        ("Zarr store", format_bytes(r["nvme_bytes"])),
        ("formats", "  ".join(f"{k} {v}" for k, v in r["formats"].items())),
        ("blocks per tier at the end", "  ".join(f"{k} {v}" for k, v in r["blocks_at_end"].items())),
        ("blocks up / down", f"{r['promoted_blocks']:,} / {r['demoted_blocks']:,}"),
        *((k.replace("_", " "), format_bytes(v)) for k, v in r["moved_bytes"].items()),
        ("context read from", "  ".join(f"{k} {100 * v / reads:.1f} %" for k, v in r["read_blocks"].items())),
        ("recomputed after restart", f"{r['recomputed_tokens_after_restart']} tokens"),
        (f"fill ({r['fill']})", f"{r['prefill_s']:.1f} s"),
        ("first token after resume", f"{r['resume_ttft_s']:.2f} s" + _faster(r)),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _faster(r: dict[str, Any]) -> str:
    """How a resume compares with the prefill that it saves; nothing where the cache was filled without one."""
    return f" ({r['prefill_s'] / r['resume_ttft_s']:.0f}x faster)" if r["fill"] == "prefill" else ""
