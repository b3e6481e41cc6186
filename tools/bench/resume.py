"""The resume row of `kvtier bench decode`: first token of a parked session from a cold disk, against its prefill.

The session is computed once by the engine, parked, and its engine closed. Then a new engine over the same store answers a
one-token turn: opening the store, finding the session and reading its context are all in the time, loading weights is not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from .harness import Row
from .page_cache import sync_files

DEVICE_SHARE = 1.25  # of the session's K/V: the session fits once it is back
SPARE_TOKENS = 4096


def resume_row(make_model: Callable[[], Any], context: int, vocab: int, token_bytes: int, rounds: int) -> Row:
    """Seconds to the first token of a resumed session of so many tokens; the median of the rounds."""
    model = make_model()
    size = int(DEVICE_SHARE * token_bytes * (context + SPARE_TOKENS))
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        store = Path(folder) / "store"
        config = PagerConfig(device_bytes=size, host_bytes=size // 4, nvme_path=store, nvme_bytes=2 * size)
        first = SamplingParams(max_tokens=1)
        with Engine.from_model(model, config) as engine:
            session = engine.session("bench")
            started_s = time.perf_counter()
            session.send([(7 * i + 1) % vocab for i in range(context)], first)
            prefill_s = time.perf_counter() - started_s
            session.park()
        resumes = sorted(_resume(model, config, store, first) for _ in range(rounds))
    resume_s = resumes[rounds // 2]
    return Row.of_times(
        f"{context} tokens, float32", "resume from disk", "s", resume_s, "prefill of the same", prefill_s, 1.0, rounds
    )


def _resume(model: Any, config: PagerConfig, store: Path, params: SamplingParams) -> float:
    sync_files(store, drop=True)
    started_s = time.perf_counter()
    with Engine.from_model(model, config) as engine:
        session = engine.session("bench")
        before = len(session.token_ids)
        output = session.send([1], params)
        seconds = time.perf_counter() - started_s
        if output.usage.recomputed_tokens:
            raise RuntimeError(f"{output.usage.recomputed_tokens} tokens were computed again")
        session.rollback(before)
        session.park()
    return seconds
