"""Pins: prefixes that clients asked to keep. A pin is a sequence over their blocks, so that no tier drops the last copy;
blocks still move down when the device tier needs room. Bounded in tokens and in number, each ends by itself.

Everything here runs on the engine loop's thread. Pins end with the process; their blocks stay in the store as cache.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ...pager.pager import Pager
from ...tiers.errors import QueueFullError

MAX_PINS = 1024


@dataclass(frozen=True, slots=True)
class Pin:
    """`owner` is the namespace of the key that asked, salted or not."""

    id: str
    owner: str
    namespace: str
    seq: int
    tokens: int
    keys: tuple[bytes, ...]
    until_s: float


class Pins:
    """Of one pager, up to max_tokens in distinct blocks."""

    def __init__(self, pager: Pager, max_tokens: int, clock: Callable[[], float]) -> None:
        self._pager, self._clock = pager, clock
        self._max_blocks = max_tokens // pager.block_size
        self._pins: dict[str, Pin] = {}
        self._blocks: Counter[bytes] = Counter()

    @property
    def tokens(self) -> int:
        """Pinned ones, those of a shared block once."""
        return len(self._blocks) * self._pager.block_size

    def hold(self, seq: int, num_tokens: int, ttl_s: float, owner: str) -> Pin | None:
        """Keep the whole blocks among the first num_tokens computed tokens of a sequence. None when there is no whole one.

        A pin of the same owner that this one contains and outlives becomes this one.
        Raises: QueueFullError; then every pin stays as it was.
        """
        self.expire()
        size, namespace = self._pager.block_size, self._pager.namespace(seq)
        keys = tuple(self._pager.block_keys(seq, 0, num_tokens // size * size))
        if not keys:
            return None
        until_s = self._clock() + ttl_s
        contained = [
            pin.id
            for pin in self._pins.values()
            if (pin.owner, pin.namespace) == (owner, namespace)
            and pin.until_s <= until_s
            and pin.keys == keys[: len(pin.keys)]
        ]
        # the blocks of those are all among keys: with or without them as many blocks would be held
        num_blocks = len(self._blocks.keys() | set(keys))
        if len(self._pins) - len(contained) >= MAX_PINS or num_blocks > self._max_blocks:
            raise QueueFullError(
                f"pins hold {len(self._blocks)} of at most {self._max_blocks} blocks ({len(self._pins)} of at most "
                f"{MAX_PINS} pins); delete one, or wait until one ends",
                retry_after_s=60.0,
            )
        held = self._pager.fork(seq)
        tokens = self._pager.truncate(held, len(keys) * size)
        for pin_id in contained:
            self.let_go(pin_id, owner)
        pin = Pin(f"pin-{secrets.token_hex(8)}", owner, namespace, held, tokens, keys, until_s)
        self._pins[pin.id] = pin
        self._blocks.update(keys)
        return pin

    def let_go(self, pin_id: str, owner: str) -> bool:
        """False when this owner has no such pin."""
        pin = self._pins.get(pin_id)
        if pin is None or pin.owner != owner:
            return False
        del self._pins[pin_id]
        self._pager.finish(pin.seq)
        self._blocks -= Counter(pin.keys)
        return True

    def of(self, owner: str) -> list[tuple[Pin, float]]:
        """This owner's pins, with the seconds that each has left."""
        self.expire()
        return [(pin, pin.until_s - self._clock()) for pin in self._pins.values() if pin.owner == owner]

    def expire(self) -> None:
        now_s = self._clock()
        for pin in [p for p in self._pins.values() if p.until_s <= now_s]:
            self.let_go(pin.id, pin.owner)

    def close(self) -> None:
        for pin in list(self._pins.values()):
            self.let_go(pin.id, pin.owner)
