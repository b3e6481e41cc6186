"""The part of `kvtier bench inspect` that looks at pagerd: every view while it holds a million blocks, and what watching costs
a client that looks keys up without pause.

The daemon is a process of its own, filled over its protocol. Blocks are tiny, so no figure contains moving bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span

from ...pager.client.attachment import Attachment
from ...pager.client.connection import Greeting
from ...pager.inspection.asking import Target
from ...pager.inspection.snapshot import page_path
from .daemon import fill
from .daemon_client import MODEL, keys_of
from .daemon_process import DaemonProcess
from .harness import Row
from .watching import TURN_S, VIEW_ROUNDS, questions, views, watched

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=1, dtype="float32")
SESSIONS, SESSION_TOKENS = 100, 64
KEYS = 512  # of one look-up


def rows(blocks: int, rounds: int) -> list[Row]:
    room = int(1.1 * blocks) + SESSIONS * SESSION_TOKENS
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-") as folder,
        DaemonProcess(Path(folder) / "sock", ["--host-bytes", str(room * LAYOUT.block_bytes)]) as daemon,
    ):
        address = daemon.address
        fill(address, blocks, LAYOUT)
        prompt = _park_sessions(address)
        target = Target.find(address, timeout_s=60.0)
        asked = questions(target, f"s{SESSIONS - 1}", prompt)
        assert target.socket is not None
        case = f"pagerd, {blocks:,} blocks"
        page, pid = page_path(target.socket), daemon.process.pid
        return [*views(target, asked, case, min(rounds, VIEW_ROUNDS)), *_watched(address, page, pid, rounds)]


def _park_sessions(address: str) -> list[int]:
    """The tokens of the last one."""
    config = PagerConfig(
        device_bytes=4 * SESSION_TOKENS * LAYOUT.block_bytes, host_bytes=0, staging_bytes=0, backend="cpu"
    )
    prompt: list[int] = []
    with Pager.connect(address, LAYOUT, config, model_fingerprint=MODEL) as pager:
        for number in range(SESSIONS):
            prompt, seq = [number * SESSION_TOKENS + i for i in range(SESSION_TOKENS)], pager.begin()
            pager.append(seq, prompt)
            with pager.lease([Span(seq, 0, len(prompt))]) as lease:
                lease.commit()
            pager.park(f"s{number}", seq)
    return prompt


def _watched(address: str, page: Path, pid: int, rounds: int) -> Iterator[Row]:
    client = Attachment.open(address, [LAYOUT], MODEL, {}, Greeting("bench"))
    keys = keys_of(KEYS)

    def look_up() -> int:
        until_s, done = time.monotonic() + TURN_S, 0
        while time.monotonic() < until_s:
            client.lookup(keys, prefix=True, hold=False)
            done += 1
        return done

    yield from watched(page, pid, look_up, rounds, f"look-ups of {KEYS} keys while pagerd is watched")
    client.goodbye()
