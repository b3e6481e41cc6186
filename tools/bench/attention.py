"""`kvtier bench attention`: attention over pages, full and compressed, against torch on contiguous KV and the memory's speed.

Every case of one shape and context runs in turn within each round. References, all of the same run: torch SDPA on
contiguous KV with the query heads of a group handed over as rows (the fastest call there is), SDPA with enable_gqa (what
transformers makes), and the time in which memory can be read once (a sum of the same bytes as integers). The aims stand
beside, as rows of their own. One layer's KV is made, so 128K tokens with 32 KV heads fit in 12 GB; what does not fit is left
out and said so. A chunk of a prefill far into a long prompt is timed for one shape and format. What is compared is in
`attention_cases.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...tiers.errors import ConfigError
from ...tiers.layout import format_bytes
from ...tiers.machine import Machine
from .attention_cases import (
    FAST_SDPA,
    FORMATS,
    PAGES,
    PLAIN_SDPA,
    SHAPES,
    SLOW_TOKENS,
    Case,
    Cases,
    bytes_wanted,
    compressed_name,
    is_slow,
    unpacked_name,
)
from .harness import Row, interleave, medians

LAUNCHES = {"cpu": 1, "cuda": 20}  # calls per measurement: one is too short to time on a GPU
LEAST_ROUNDS = 3
FLOOR = "memory read once"
AIM_TOKENS = 128 << 10  # of decoding
# of what a chunked prefill does late in a long prompt: seconds per call on a CPU
FAR_SHAPE, FAR_FORMAT = "GQA4", "int8"
# (way, reference, how many times faster it should be at least)
AIMS = {
    "cpu": ((PAGES, FAST_SDPA, 1.0), (PAGES, PLAIN_SDPA, 5.0)),
    "cuda": (
        (PAGES, FLOOR, 0.9),
        (compressed_name("fp8"), PAGES, 1.8),
        (compressed_name("int4"), PAGES, 3.0),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default="4096,32768,131072", metavar="N,N", help="tokens of KV for decode")
    parser.add_argument(
        "--prefill-contexts", default="4096,16384", metavar="N,N", help="likewise for prefill; may be empty"
    )
    parser.add_argument(
        "--far-contexts",
        default="131072",
        metavar="N,N",
        help=f"likewise, {FAR_SHAPE} and {FAR_FORMAT} alone; may be empty",
    )
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="query tokens of the prefill (default 256)")
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B", help="page formats")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="at most (default 9)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="for the rounds of a shape and context; three at least"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in milliseconds per layer. Raises ConfigError for contexts, shapes and formats that cannot be."""
    import torch

    from ...kernels.formats import FORMATS as KNOWN

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.accelerator.is_available() else "cpu"
    contexts, prefills, far = (_numbers(arguments, f"{name}contexts") for name in ("", "prefill_", "far_"))
    shapes, formats = _names(arguments, "shapes", SHAPES), _names(arguments, "formats", KNOWN)
    if arguments.rounds < 1 or arguments.rows < 1 or arguments.seconds <= 0:
        raise ConfigError(
            f"--rounds {arguments.rounds}, --rows {arguments.rows}, --seconds {arguments.seconds}: need positive numbers"
        )
    found = []
    for shape in shapes:
        long = far if shape == FAR_SHAPE else []
        for rows, context in [(1, n) for n in contexts] + [(arguments.rows, n) for n in [*prefills, *long]]:
            is_far = rows > 1 and context in long
            name = f"{shape} {context} tokens, {'decode' if rows == 1 else f'prefill of {rows}'}"
            wanted, free = bytes_wanted(shape, context), Machine().memory_room_bytes()
            if device == "cpu" and wanted > free:  # the system would end the process
                why = f"left out: needs {format_bytes(wanted)} of memory, {format_bytes(free)} are free"
                found.append(Row(name, "left out", 1, "case", why))
                continue
            asked = [fmt for fmt in formats if not is_far or fmt == FAR_FORMAT]
            slow = [fmt for fmt in asked if is_slow(fmt, device, context, rows)]
            why = f"left out: prefill in this format is timed up to {SLOW_TOKENS} tokens on a CPU"
            found += [Row(name, f"{compressed_name(fmt)} left out", 1, "case", why) for fmt in slow]
            bench = _Bench(Cases(torch, device, shape, context, rows), name, [f for f in asked if f not in slow])
            if is_far:
                bench.leave_out(PLAIN_SDPA)  # five times the time of all others together
            found += bench.rows(arguments.rounds, arguments.seconds)
            del bench  # gigabytes, before the next ones are made
    return found


def _numbers(arguments: argparse.Namespace, name: str) -> list[int]:
    text = getattr(arguments, name)
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) % 256 == 0 and int(part) for part in parts):
        raise ConfigError(f"--{name.replace('_', '-')} {text!r}: need multiples of 256 tokens, as in 4096,32768")
    return [int(part) for part in parts]


def _names(arguments: argparse.Namespace, name: str, known: Any) -> list[str]:
    parts = [part for part in getattr(arguments, name).split(",") if part]
    if unknown := [part for part in parts if part not in known]:
        raise ConfigError(f"--{name} {unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return parts


class _Bench:
    """One shape, context and number of query rows, attended to in every way."""

    def __init__(self, cases: Cases, name: str, formats: list[str]) -> None:
        self.name, self.device, self.context, self.is_decode = name, cases.device, cases.context, cases.rows == 1
        self.read, self.formats = cases.read, formats
        self.cases: dict[str, Case] = cases.contiguous() | {PAGES: cases.paged()}
        for fmt in formats:
            self.cases |= cases.compressed(fmt)

    def leave_out(self, name: str) -> None:
        self.cases.pop(name, None)

    def rows(self, most_rounds: int, limit_s: float) -> list[Row]:
        """Rounds until the time is up: one that is not counted, which says how long they take, and three at least."""
        timed = {name: self._timed(case.run) for name, case in self.cases.items()} | {FLOOR: self._timed(self.read)}
        if self.device == "cuda":
            interleave(timed, 1, warmup=0)  # compiles
        start_s = time.perf_counter()
        interleave(timed, 1, warmup=0)
        round_s = time.perf_counter() - start_s
        rounds = min(most_rounds, max(LEAST_ROUNDS, int(limit_s / round_s) - 1))
        seconds = medians(interleave(timed, rounds, warmup=0))
        each = {name: found / LAUNCHES[self.device] for name, found in seconds.items()}
        return [*self._times(each, rounds), *self._aims(each, rounds)]

    def _times(self, each: Mapping[str, float], rounds: int) -> Iterator[Row]:
        """Every case against each of its references."""
        read_s_per_byte = each[FLOOR] / self.cases[FAST_SDPA].nbytes
        yield self._row(FLOOR, each[FLOOR], "itself", each[FLOOR], rounds)
        for name, case in self.cases.items():
            for other in self._references(name):
                if other in each:
                    yield self._row(name, each[name], other, each[other], rounds)
            yield self._row(name, each[name], "its bytes read once", case.nbytes * read_s_per_byte, rounds)

    def _references(self, name: str) -> list[str]:
        if name == FAST_SDPA:
            return []
        if name == PLAIN_SDPA:
            return [FAST_SDPA]
        unpacked = [unpacked_name(fmt) for fmt in self.formats if name == compressed_name(fmt)]
        return [FAST_SDPA, PLAIN_SDPA, *unpacked]

    def _aims(self, each: Mapping[str, float], rounds: int) -> Iterator[Row]:
        """How many times faster than the reference, against what is aimed at."""
        for name, other, least in AIMS[self.device] if self.is_decode and self.context == AIM_TOKENS else ():
            if name in each and other in each:
                times = each[other] / each[name]
                yield Row(
                    self.name, f"{name}: speed", times, f"x {other}", "aim: at least", least, times / least, rounds
                )

    def _row(self, name: str, ours_s: float, reference: str, reference_s: float, rounds: int) -> Row:
        return Row.of_times(self.name, name, "ms", ours_s, reference, reference_s, 1e3, rounds)

    def _timed(self, run: Callable[[], tuple[Any, Any]]) -> Callable[[], object]:
        """Run a case as often as is worth timing, and wait for the device by looking at a number."""

        def timed() -> float:
            for _ in range(LAUNCHES[self.device]):
                result = run()[0]
            return float(result.flatten()[0])

        return timed
