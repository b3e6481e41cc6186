"""What keeping tenants apart costs, and whether it shows: encryption at rest against memcpy and against a store without
it, and the time of a lookup for keys that are another tenant's against keys that nobody has.

The two kinds of keys are asked in turn, in shuffled order, over many rounds; the row holds the difference of the medians
beside the spread of one kind against itself, so that a difference is a leak only where it is larger than noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...pager.config import PagerConfig
from ...pager.daemon.store import SharedStore
from ...pager.daemon.tenants import Tenant
from ...pager.keys import KeyChain, owner_tag
from ...tiers.cpu import CpuBackend
from ...tiers.errors import ConfigError
from ...tiers.layout import KVLayout
from ...tiers.nvme.manifest import STAMP
from ...tiers.nvme.store import NvmeTier, StoreIdentity
from .harness import Row, interleave, medians

BLOCKS = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 2 MiB
SMALL = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=16, dtype="float32")
SECRETS = {owner_tag("mine"): b"s" * 32}
KEYS, ASKED = 2048, 16
CODECS = ("none", "aes", "zstd", "zstd+aes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=64, metavar="N", help="of 2 MiB, per round (default 64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--lookups", type=int, default=4000, metavar="N", help="lookups of each kind (default 4000)")
    parser.add_argument("--dir", metavar="PATH", help="where stores are made (default: a temporary directory)")


def run(arguments: argparse.Namespace) -> list[Row]:
    if min(arguments.blocks, arguments.rounds, arguments.lookups) < 1:
        raise ConfigError("--blocks, --rounds and --lookups need at least 1")
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=arguments.dir) as folder:
        stores = _stores(Path(folder), arguments.blocks, arguments.rounds)
    return [*_sealing(arguments.rounds), *stores, *_lookups(arguments.lookups)]


# ---------------------------------------------------------------------- encryption
def _sealing(rounds: int) -> list[Row]:
    """One block at a time, one thread, no disk."""
    from ...tiers.nvme.sealing import OVERHEAD_BYTES, BlockSealer

    sealer, row, (owner,) = BlockSealer(SECRETS, BLOCKS.fingerprint), _random_rows(1)[0], SECRETS
    plain, copied, into = np.empty_like(row), np.empty_like(row), np.empty(len(row) + OVERHEAD_BYTES, np.uint8)
    sealed = sealer.seal(row, owner, b"k" * 32, 1)
    cases: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(copied, row),
        "seal": lambda: sealer.seal(row, owner, b"k" * 32, 1, into),
        "open": lambda: sealer.open(sealed, plain),
    }
    times_s = medians(interleave(_repeated(cases, 20), rounds))
    assert np.array_equal(plain, row)
    scale = 20 * len(row) / 1e9
    reference = scale / times_s["memcpy"]
    return [
        Row(
            f"{name} 2 MiB",
            "rate",
            scale / times_s[name],
            "GB/s",
            "memcpy",
            reference,
            times_s["memcpy"] / times_s[name],
            rounds,
        )
        for name in ("seal", "open")
    ]


def _repeated(cases: dict[str, Callable[[], object]], times: int) -> dict[str, Callable[[], object]]:
    def many(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: [work() for _ in range(times)]

    return {name: many(work) for name, work in cases.items()}


def _stores(folder: Path, blocks: int, rounds: int) -> list[Row]:
    backend, rows = CpuBackend(), _random_rows(blocks)
    stores = {codec: _Store(folder / codec, codec, rows, backend) for codec in CODECS}
    try:
        found = []
        for verb in ("write", "read"):
            times_s = medians(interleave({codec: getattr(store, verb) for codec, store in stores.items()}, rounds))
            for codec, without in (("aes", "none"), ("zstd+aes", "zstd")):
                rate, reference = (rows.nbytes / times_s[name] / 1e9 for name in (codec, without))
                what = f"{verb} {blocks} blocks, codec {codec}"
                found.append(Row(what, "rate", rate, "GB/s", f"codec {without}", reference, rate / reference, rounds))
        return found
    finally:
        for store in stores.values():
            store.tier.close()
        backend.close(10.0)


class _Store:
    """A store under one codec, and memory to read into."""

    def __init__(self, path: Path, codec: str, rows: Any, backend: CpuBackend) -> None:
        self._rows, self._target = rows, backend.alloc_host(*rows.shape)
        identity = StoreIdentity("bench", (BLOCKS,))
        self.tier = NvmeTier.open(
            path, identity, num_slots=[len(rows)], backend=backend, codecs=[codec], secrets=SECRETS, durability="none"
        )
        self._slots = self.tier.allocate(0, len(rows))
        self._stamps = np.zeros(len(rows), STAMP)
        self._stamps["owner"] = next(iter(SECRETS))
        self._places = np.arange(len(rows))

    def write(self) -> None:
        ticket = self.tier.write(0, self._slots, self._rows, self._places, self._stamps)
        ticket.event.wait()
        assert ticket.ok.all()

    def read(self) -> None:
        ticket = self.tier.read(0, self._slots, self._target, self._places, self.tier.stamps(0, self._slots))
        ticket.event.wait()
        assert ticket.ok.all()


def _random_rows(count: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, BLOCKS.block_bytes), np.uint8)


# ---------------------------------------------------------------------- presence
def _lookups(times: int) -> list[Row]:
    """Differences of medians, as a share of a lookup's time; the reference is what two kinds that are alike differ by.

    same tokens: what a tenant asks for who has another's token ids and his own secret. foreign: another's very keys, which
    nobody can compute without the secret.
    """
    config = PagerConfig(device_bytes=0, host_bytes=4096 * SMALL.block_bytes, backend="cpu", host_prefault=False)
    store = SharedStore.open((SMALL,), config, model_fingerprint="bench", about={})
    try:
        rng = random.Random(0)
        tokens = [rng.randrange(1 << 17) for _ in range(KEYS * SMALL.block_size)]
        alice, bob = (Tenant(name, {name: name.encode() * 8}, maps_slab=False) for name in ("alice", "bob"))
        foreign = _keys_of(alice, tokens)
        _fill(store, alice, foreign)
        kinds = {
            "same tokens": _keys_of(bob, tokens),
            "foreign": foreign,
            "absent": [rng.randbytes(32) for _ in range(KEYS)],
            "other absent": [rng.randbytes(32) for _ in range(KEYS)],
        }
        middle = _median_lookups(store, bob, kinds, times, rng)
    finally:
        store.close(5.0)
    noise = abs(middle["other absent"] / middle["absent"] - 1)
    return [
        Row(
            f"lookup of {ASKED} keys: {what}, against keys that nobody has",
            "difference of medians",
            100 * abs(middle[kind] / middle["absent"] - 1),
            "%",
            "keys that nobody has, against other such keys",
            100 * noise,
            None,
            times,
        )
        for kind, what in (("same tokens", "another tenant's tokens"), ("foreign", "another tenant's keys"))
    ]


def _median_lookups(
    store: SharedStore, tenant: Tenant, kinds: dict[str, list[bytes]], times: int, rng: random.Random
) -> dict[str, float]:
    """Seconds per kind; the kinds take turns in an order of their own."""
    client = store.attach(tenant)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    turns = [kind for kind in kinds for _ in range(times)]
    rng.shuffle(turns)
    for kind in turns:
        blob = b"".join(rng.sample(kinds[kind], ASKED))
        keys: list[bytes] = np.frombuffer(blob, "V32").tolist()  # new objects each time, as from a frame
        start_s = time.perf_counter()
        store.lookup(client, keys, prefix=False, hold=True)
        seconds[kind].append(time.perf_counter() - start_s)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def _keys_of(tenant: Tenant, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    KeyChain("bench", tenant.name, tenant.namespaces[tenant.name], SMALL.block_size).extend(keys, tokens)
    return keys


def _fill(store: SharedStore, tenant: Tenant, keys: list[bytes]) -> None:
    client = store.attach(tenant)
    owner = np.array([owner_tag(tenant.name)], np.uint32)
    for key in keys:
        slots, _ = store.reserve(client, 0, 1)
        store.commit(client, 0, slots, [key], [bytes(32)], np.array([SMALL.block_size]), owner, hold=False)
        store.release(client, 0, slots)
    store.detach(client)
