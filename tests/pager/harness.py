"""A stand-in engine for pager tests: writes values that depend on the whole prefix, and checks every value it reads.

Reads and writes are queued on the compute stream as a kernel would be, so under the seeded scheduler they run late and in
an order that the seed picks. A missing wait anywhere shows as a wrong value here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kvtier.pager.config import PagerConfig
from kvtier.pager.lease import Lease, Span
from kvtier.pager.pager import Pager
from kvtier.pager.rules import ALL_RULES, Rules
from kvtier.tiers.errors import BlockMissError, KvTierError, TierFullError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.simulated import SimulatedBackend

BLOCK = 4
LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=BLOCK, dtype="float32", name="full")
PACKABLE = KVLayout(num_layers=2, num_kv_heads=1, head_dim=16, block_size=16, dtype="float32", name="full")
ROUNDED = 2500.0  # what int4 after int8 leaves of values up to 65536, and far less than what another block would
WINDOWED = KVLayout(
    num_layers=1, num_kv_heads=1, head_dim=4, block_size=BLOCK, dtype="float32", window=10, name="window"
)


def values(token_ids: list[int]) -> np.ndarray:
    """One number per token that depends on all tokens before it."""
    out, running = np.empty(len(token_ids), np.float32), 1
    for i, token in enumerate(token_ids):
        running = (running * 31 + token + 7) % 65521
        out[i] = running
    return out


class Rig:
    """A pager and an engine that checks what it reads. `wrong` lists every mismatch in a step that counted."""

    def __init__(
        self,
        seed: int = 0,
        *,
        pages: int = 8,
        host: int = 16,
        layouts: list[KVLayout] | None = None,
        path=None,
        rules: Rules = ALL_RULES,
        backend=None,
        staging: int = 0,
        clock: Callable[[], float] = time.monotonic,
        calls=None,
        daemon: str | None = None,
        error: float = 0.0,
        host_format: str = "full",
        **config,
    ) -> None:
        """`daemon`: the address of one; then `host` and `path` are its business. `error`: how far values may be off."""
        self.layouts, self.error = layouts or [LAYOUT], error
        self.block = self.layouts[0].block_size
        self.backend = backend or SimulatedBackend(seed)
        block_bytes = sum(layout.block_bytes for layout in self.layouts)
        staging_bytes = 3 * staging * self.layouts[0].layer_bytes
        settings = {"staging_bytes": staging_bytes, "low_watermark": 0.2, "high_watermark": 0.4} | config
        settings["host"] = host_format
        options = {"model_fingerprint": "rig", "backend": self.backend, "rules": rules, "clock": clock}
        device_bytes = pages * block_bytes + staging_bytes
        try:
            if daemon is not None:
                private = settings.pop("private_host", None)
                host_bytes = 0 if private is None else private * block_bytes + staging_bytes
                given = PagerConfig(device_bytes, host_bytes, **settings)
                self.pager = Pager.connect(daemon, self.layouts, given, share_memory=private is None, **options)
            else:
                host_bytes = host * block_bytes + (staging_bytes if path else 0)
                given = PagerConfig(device_bytes, host_bytes, nvme_path=path, **settings)
                self.pager = Pager.open(self.layouts, given, calls=calls, **options)
        except KvTierError:
            if not isinstance(self.backend, SimulatedBackend):
                self.backend.close(5)  # it has threads
            raise
        self._counted: list[list[str]] = []  # mismatches of each step that was committed; kernels may still add to them
        self._found: list[str] = []  # those of the step being computed
        self.expected: dict[int, np.ndarray] = {}

    @property
    def wrong(self) -> list[str]:
        return [mismatch for step in self._counted for mismatch in step]

    # ------------------------------------------------------------------ the engine's verbs
    def start(self, token_ids: list[int], namespace: str = "default") -> int:
        seq = self.pager.begin(namespace)
        self.pager.attach(seq, token_ids[:-1])
        self.pager.append(seq, token_ids[self.pager.num_computed(seq) :])
        return seq

    def prefill(self, seq: int, chunk: int = 8, **options) -> int:
        """Compute everything that is not; returns how many tokens were computed."""
        total, computed = len(self.pager.token_ids(seq)), 0
        while self.pager.num_computed(seq) < total:
            computed += self.step([(seq, self.pager.plan_prefill(seq, chunk))], **options)
        return computed

    def step(self, work: list[tuple[int, int]], **options) -> int:
        """One model step over (sequence, number of tokens); retried from what is left when a block was lost."""
        spans = [Span(seq, self.pager.num_computed(seq), self.pager.num_computed(seq) + n) for seq, n in work]
        try:
            with self.pager.lease(spans, **options) as lease:
                self.compute(lease)
                lease.commit()
                self._counted.append(self._found)
        except BlockMissError:
            return 0
        return sum(n for _, n in work)

    def say(self, seq: int, token_ids: list[int], **options) -> None:
        self.pager.turn(seq, token_ids)
        self.prefill(seq, **options)

    # ------------------------------------------------------------------ the kernels
    def compute(self, lease: Lease) -> None:
        self._found = []
        for g, layout in enumerate(self.layouts):
            for layer in range(layout.num_layers):
                staged = [self._read_staged(lease, g, layer, chunk) for chunk in lease.stream(g, layer)]
                self._write(lease, g, layer)
                self._read(lease, g, layer, skipped=set(np.concatenate(staged).tolist()) if staged else set())

    def _write(self, lease: Lease, g: int, layer: int) -> None:
        rows, slots = self.view(g, layer), lease.slots[g].copy()
        new = np.concatenate([values(self.pager.token_ids(s.seq))[s.start : s.end] for s in lease.spans])

        def kernel() -> None:
            rows[slots // self.block, :, slots % self.block] = new[:, None, None] + layer

        self.backend.compute.run(kernel)

    def _read(self, lease: Lease, g: int, layer: int, skipped: set[int]) -> None:
        rows, dim = self.view(g, layer), self.layouts[g].head_dim
        for i, span in enumerate(lease.spans):
            wanted = values(self.pager.token_ids(span.seq))[: span.end]
            length = int(lease.kv_lens[g][i])
            pages = lease.tables[g][i][: -(-length // self.block)].copy()
            positions = self.positions(lease, g, i, skipped)
            assert len(positions) == length

            def kernel(
                pages=pages, wanted=wanted, positions=positions, span=span, length=length, found=self._found
            ) -> None:
                seen = rows[pages].transpose(0, 2, 1, 3).reshape(-1, 2, dim)[:length]
                where = f"seq {span.seq} {self.layouts[g].name} layer {layer}"
                compare(seen, wanted[positions] + layer, where, found, self.error)

            self.backend.compute.run(kernel)

    def _read_staged(self, lease: Lease, g: int, layer: int, staged) -> np.ndarray:
        layout, span = self.layouts[g], lease.spans[0]
        table = self.pager._core.sequences[span.seq].tables[g].ids
        logical = np.array([int(np.flatnonzero(table == block)[0]) for block in staged.blocks])
        wanted, rows, count = values(self.pager.token_ids(span.seq)), staged.rows, staged.count
        taken = slice(0, count) if staged.slots is None else staged.slots

        def kernel(found=self._found) -> None:
            seen = np.ascontiguousarray(rows[taken]).view(np.float32).reshape(count, 2, self.block, layout.head_dim)
            positions = (logical[:, None] * self.block + np.arange(self.block)).reshape(-1)
            seen = seen.transpose(0, 2, 1, 3).reshape(-1, 2, layout.head_dim)
            compare(seen, wanted[positions] + layer, f"staged layer {layer}", found, self.error)

        self.backend.compute.run(kernel)
        return logical

    def positions(self, lease: Lease, g: int, i: int, skipped: set[int]) -> np.ndarray:
        """Token positions that the compact table of one span lists, in order."""
        span, layout = lease.spans[i], self.layouts[g]
        first = 0 if layout.window is None else max(0, span.start - layout.window + 1) // self.block
        blocks = [b for b in range(first, -(-span.end // self.block)) if b not in skipped]
        positions = np.concatenate([np.arange(b * self.block, (b + 1) * self.block) for b in blocks])
        return positions[positions < span.end]

    def view(self, g: int, layer: int) -> np.ndarray:
        """[pages, 2, block, head_dim] of one layer."""
        layout = self.layouts[g]
        pool = self.pager.device_rows(g).view(np.float32)
        return pool.reshape(len(pool), layout.num_layers, 2, self.block, layout.head_dim)[:, layer]

    def settle(self) -> None:
        """Let everything queued run."""
        self.backend.compute.synchronize(60.0)
        self.pager.drain(60.0)

    def close(self) -> None:
        self.settle()
        self.pager.close()


def compare(seen: np.ndarray, wanted: np.ndarray, where: str, found: list[str], error: float = 0.0) -> None:
    """Note the first token row [2, head_dim] that does not hold its value."""
    is_wrong = ~(np.abs(seen - wanted[:, None, None]) <= error).all((1, 2))
    if is_wrong.any():
        bad = int(np.flatnonzero(is_wrong)[0])
        found.append(f"{where}: token row {bad} reads {seen[bad, 0, 0]}, wanted {wanted[bad]}")


__all__ = ["BLOCK", "LAYOUT", "PACKABLE", "ROUNDED", "WINDOWED", "Rig", "TierFullError", "values"]
