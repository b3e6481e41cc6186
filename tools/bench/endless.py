"""`kvtier bench endless`: a text without end through a window with sinks: memory at the start and at the end of it.

The needle model reads filler in chunks, as a chat that never stops would grow. Blocks held and the process's resident
memory are looked at after every chunk; the second tenth of the run is compared with the last.
"""

from __future__ import annotations

import argparse
import time

from ...tiers.errors import ConfigError
from .harness import Row, resident_bytes

CHUNK_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--window", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--sinks", type=int, default=4, metavar="TOKENS")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for numbers that make no run."""
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens {arguments.tokens}: need at least 1")
    import torch

    from kvtier import Engine, PagerConfig, SamplingParams

    from ...engine.hf import StreamingWindow
    from ...engine.needle import NeedleSpec, build_needle_model, needle_prompt

    spec = NeedleSpec()
    model = build_needle_model(spec, dtype=torch.float32)
    filler, _ = needle_prompt(spec, CHUNK_TOKENS, 1)
    window = StreamingWindow(arguments.window, arguments.sinks)
    config = PagerConfig(device_bytes="64MiB", host_bytes=0, backend="cpu")
    held, sizes, fed = list[int](), list[int](), 0
    with Engine.from_model(model, config, block_size=256, streaming=window) as engine:
        session = engine.session("endless")
        start_s = time.perf_counter()
        while fed < arguments.tokens:
            count = min(CHUNK_TOKENS, arguments.tokens - fed)
            session.send(filler[:count], SamplingParams(max_tokens=1))
            fed += count
            held.append(engine.pager.pages_needed([(session.seq, 1)])[0][0])
            sizes.append(resident_bytes())
        spent_s = time.perf_counter() - start_s
        computed = session.num_computed
    tenth = max(1, len(sizes) // 10)
    early, late = max(sizes[tenth : 2 * tenth] or sizes), max(sizes[-tenth:])
    case = f"{fed} tokens, window {arguments.window}, {arguments.sinks} sinks"
    return [
        Row(case, "tokens computed", computed, "", "fed", fed, computed / fed),
        Row(case, "device pages", held[-1], "pages", "after the first chunk", held[0], held[0] / held[-1]),
        Row(case, "resident memory", late, "bytes", "in the second tenth of the run", early, early / late),
        Row(case, "rate", fed / spent_s, "tokens/s", "nothing to compare with"),
    ]
