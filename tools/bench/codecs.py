"""`kvtier bench codecs`: how much smaller each codec makes KV, how fast on one core, and what a store makes of it.

Codec rows: seconds are of the processor, one thread, so a busy machine changes little; GB/s count the block's bytes, not
its encoding's; every block is compared after decoding. The limit in the same rounds is one memcpy. Store rows: seconds are
of the clock, all workers, checksums on; the reference is the same store without a codec.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...tiers.cpu import CpuBackend
from ...tiers.errors import ConfigError
from ...tiers.nvme.codecs import CODECS, NONE, BlockCodec, codec_for
from ...tiers.nvme.store import STAMP, NvmeTier, StoreIdentity
from .harness import Row, check_folder, interleave, medians
from .kv_samples import Sample, samples

STORED = "random Llama in bf16"
_GB = 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", default=".", metavar="DIR", help="a directory on the disk for the stores")
    parser.add_argument("--blocks", type=int, default=16, metavar="N", help="2 MiB blocks of each kind of KV")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of ratios and GB/s. Raises ConfigError when the directory cannot be used."""
    if arguments.blocks < 1 or arguments.rounds < 1:
        raise ConfigError(f"--blocks {arguments.blocks}, --rounds {arguments.rounds}: need positive numbers")
    check_folder(arguments.path)
    found: list[Row] = []
    for sample in samples(arguments.blocks):
        found += _codec_rows(sample, arguments.rounds)
        if sample.name == STORED:
            kept = sample
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        return found + _store_rows(kept, Path(folder), arguments.rounds)


def _codec_rows(sample: Sample, rounds: int) -> list[Row]:
    coders = {name: codec for name in CODECS if (codec := codec_for(name, sample.layout)) is not None}
    encoded = {name: [codec.encode(row) for row in sample.rows] for name, codec in coders.items()}
    out = np.zeros_like(sample.rows)
    cases: dict[str, Callable[[], object]] = {"memcpy": partial(np.copyto, out, sample.rows)}
    for name, codec in coders.items():
        _decode(codec, encoded[name], out)
        assert np.array_equal(out, sample.rows), f"{name} is not lossless on {sample.name}"
        cases[f"encode {name}"] = partial(_encode, codec, sample.rows)
        cases[f"decode {name}"] = partial(_decode, codec, encoded[name], out)
    seconds = medians(interleave(cases, rounds, clock=time.thread_time))
    moved = sample.rows.nbytes * _GB
    limit = moved / seconds["memcpy"]
    found = [Row(sample.name, "memcpy", limit, "GB/s per core", "itself", limit, 1.0, rounds)]
    for name in coders:
        smaller = sample.rows.nbytes / sum(map(len, encoded[name]))
        found.append(Row(sample.name, f"ratio {name}", smaller, "x", "bytes as they are", 1.0, smaller, 1))
        for verb in ("encode", "decode"):
            speed = moved / seconds[f"{verb} {name}"]
            found.append(
                Row(sample.name, f"{verb} {name}", speed, "GB/s per core", "one memcpy", limit, speed / limit, rounds)
            )
    return found


def _encode(codec: BlockCodec, rows: Any) -> None:
    for row in rows:
        codec.encode(row)


def _decode(codec: BlockCodec, frames: list[bytes], rows: Any) -> None:
    for frame, row in zip(frames, rows, strict=True):
        codec.decode(np.frombuffer(frame, np.uint8), row)


def _store_rows(sample: Sample, folder: Path, rounds: int) -> list[Row]:
    backend = CpuBackend()
    stores = {name: _Store(sample, folder / name, name, backend) for name in CODECS}
    cases: dict[str, Callable[[], object]] = {}
    for name, store in stores.items():
        cases |= {f"write {name}": store.write, f"read {name}": store.read}
    seconds = medians(interleave(cases, rounds))
    case, moved = f"store of {len(sample.rows)} blocks: {sample.name}", sample.rows.nbytes * _GB
    found = []
    for name, store in stores.items():
        for verb in ("write", "read"):
            speed, plain = moved / seconds[f"{verb} {name}"], moved / seconds[f"{verb} {NONE}"]
            found.append(Row(case, f"{verb} {name}", speed, "GB/s", "codec none", plain, speed / plain, rounds))
        size, plain = store.tier.stored_bytes(0) / 2**20, stores[NONE].tier.stored_bytes(0) / 2**20
        found.append(Row(case, f"disk {name}", size, "MiB", "codec none", plain, plain / size, 1))
        store.tier.close()
    backend.close(5.0)
    return found


class _Store:
    """One store of one codec, written and read whole."""

    def __init__(self, sample: Sample, path: Path, codec: str, backend: CpuBackend) -> None:
        self._rows = backend.alloc_host(*sample.rows.shape)
        self._out = backend.alloc_host(*sample.rows.shape)
        self._rows[:], self._out[:] = sample.rows, 0  # faulted in
        identity, count = StoreIdentity("bench", (sample.layout,)), len(sample.rows)
        self.tier = NvmeTier.open(
            path, identity, num_slots=[16 * count], backend=backend, durability="none", codecs=[codec]
        )
        self._stamps, self._line = np.zeros(count, STAMP), np.arange(count)
        self._slots = self.tier.allocate(0, count)

    def write(self) -> None:
        ticket = self.tier.write(0, self._slots, self._rows, self._line, self._stamps)
        ticket.event.wait()
        assert ticket.ok.all()

    def read(self) -> None:
        ticket = self.tier.read(0, self._slots, self._out, self._line, self.tier.stamps(0, self._slots))
        ticket.event.wait()
        assert ticket.ok.all()
