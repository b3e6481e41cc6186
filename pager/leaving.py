"""Who may leave a layer group's device pages and host slots, and who goes first.

The rules say who may (5 to 7), pins and quotas say who may not, hints and the working set say who goes first and last, and
among the rest the policy ranks. Nothing here changes anything: the group evicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import hints
from .rules import Rule
from .states import IntArray, PageState, SlotState

if TYPE_CHECKING:
    from .group import BlockGroup

# Victims are the coldest 3 % of what is looked at, so choosing costs the same in any pool.
WINDOW_PAGES, PAGES_PER_VICTIM = 4096, 32


class Leaving:
    """Of one layer group."""

    def __init__(self, group: BlockGroup) -> None:
        self._group = group
        self._hand = 0  # page at which the next search begins
        # no tier above the host: what is not used soon leaves there, as elsewhere the device
        self.is_host_first = False

    # ------------------------------------------------------------------ device pages
    def clean_pages(self) -> int:
        """Pages that could be freed without any copy: their blocks lie below too, and no pin keeps them."""
        group = self._group
        return len(group.unpinned_by_ttl(group.pages.block[self.evictable()]))

    def evictable(self) -> npt.NDArray[np.bool_]:
        group = self._group
        if not group.rules.holds(Rule.NO_EVICTION_OF_PINNED_OR_DIRTY):
            return (group.pages.state != PageState.FREE) & (group.pages.state != PageState.FILLING)
        return (group.pages.state == PageState.RESIDENT) & group.pages.idle()  # rule 6

    def pages_kept_from(self, readers: IntArray) -> int:
        """Pages that a pin for a time keeps for blocks other than these."""
        group = self._group
        if group.last_pin_s <= group.clock():
            return 0
        blocks = group.pages.block[group.pages.state != PageState.FREE]
        pinned = blocks[group.directory.pinned_until[blocks] > group.clock()]
        return int((~np.isin(pinned, readers)).sum())

    def first_pages(self, n: int) -> IntArray:
        """The first to leave of all clean pages; in a large pool of those in a part that moves on, at least WINDOW_PAGES."""
        group = self._group
        total, evictable = len(group.pages), self.evictable()
        candidates, working, looked = group.pages.block[:0], group.pages.block[:0], 0
        while looked < total and len(candidates) < n:
            size = min(max(WINDOW_PAGES, PAGES_PER_VICTIM * n), total - looked)
            pages = (self._hand + np.arange(size)) % total
            found = group.unpinned_by_ttl(group.pages.block[pages[evictable[pages]]])
            is_working = group.working.holds(found)
            candidates = np.concatenate([candidates, found[~is_working]])
            working = np.concatenate([working, found[is_working]])
            self._hand, looked = (self._hand + size) % total, looked + size
        return self._ranked(n, "device", (*self._by_demotion(candidates), working))

    def first_to_go_down(self, n: int, dirty: IntArray) -> IntArray:
        """n of these dirty blocks: those that are not used soon, then as the policy ranks them, the working set last."""
        is_working = self._group.working.holds(dirty)
        return self._ranked(n, "device", (*self._by_demotion(dirty[~is_working]), dirty[is_working]))

    def _by_demotion(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Those that somebody said are not used soon, and the others."""
        is_demoted = self._group.directory.is_demoted[blocks]
        return blocks[is_demoted], blocks[~is_demoted]

    def _ranked(self, n: int, tier: str, classes: Iterable[IntArray]) -> IntArray:
        """Up to n blocks: class after class, within each as the policy ranks them in that tier."""
        chosen, policy = np.empty(0, np.int64), self._group.policy.of(tier)
        for blocks in classes:
            chosen = np.concatenate([chosen, policy.victims(n - len(chosen), blocks)])
            if len(chosen) >= n:
                break
        return chosen

    # ------------------------------------------------------------------ host slots
    def host_room(self, *, keep_clean: bool = False, asker: int | None = None) -> int:
        """Host slots that could be taken without any copy, for that namespace."""
        group = self._group
        most = group.host.num_free + self._slots_of_victims(keep_clean, asker)
        room = group.quotas.room(group, "host", asker)
        if room is None:
            return most
        return max(0, min(most, room + self._slots_of_victims(keep_clean, asker, asker)))

    def idle_host_slots(self) -> int:
        """Host slots that are free, or whose blocks lie on nvme as well and would only come up more slowly."""
        host = self._group.host
        below = self._group.directory.nvme_valid[host.block[host.state == SlotState.VALID]]
        return int(host.num_free) + int(np.count_nonzero(below))

    def _slots_of_victims(self, keep_clean: bool, asker: int | None, of: int | None = None) -> int:
        group = self._group
        return group.forms.slots_held(np.concatenate([group.host.block[:0], *self._may_leave(keep_clean, asker, of)]))

    def first_host_copies(self, n: int, keep_clean: bool, asker: int | None, of: int | None = None) -> IntArray:
        """Up to n host copies that may go, first to leave first."""
        return self._ranked(n, "host", self._may_leave(keep_clean, asker, of))

    def _may_leave(self, keep_clean: bool, asker: int | None, of: int | None) -> Iterator[IntArray]:
        """Host copies that may go, by class: those that cost least come first. `of`: that namespace's alone."""
        group, d = self._group, self._group.directory
        held = group.host.holds > 0
        if not group.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            held = np.zeros(len(held), bool)
        blocks = group.unpinned_by_ttl(group.host.block[(group.host.state == SlotState.VALID) & ~held])
        if group.awaited:
            blocks = blocks[~np.isin(blocks, np.concatenate(group.awaited)) | d.in_device(blocks)]
        if of is not None:
            blocks = blocks[d.owner[blocks] == of]
        blocks = group.quotas.spare(group, "host", blocks, asker)
        coming = group.working.holds(blocks) & ~d.in_device(blocks)  # read from nvme on their way up
        if self.is_host_first and d.is_demoted[blocks].any():
            stays = ~d.is_demoted[blocks]
            yield from self._by_cost(blocks[~stays], keep_clean)
            blocks, coming = blocks[stays], coming[stays]
        yield from self._by_cost(blocks[~coming], keep_clean)
        if not keep_clean and coming.any():  # a dirty page has to go down, or somebody would wait for ever
            yield from self._by_cost(blocks[coming], keep_clean)

    def _by_cost(self, blocks: IntArray, keep_clean: bool) -> Iterator[IntArray]:
        group, d = self._group, self._group.directory
        below, above = d.nvme_valid[blocks], d.in_device(blocks) & (d.page[blocks] >= 0)
        busy = above & (group.pages.state[np.maximum(d.page[blocks], 0)] == PageState.WRITING_BACK)
        first = hints.given_up(group, blocks) & ~busy & (below | ~above)
        if first.any():
            yield blocks[first]
        yield blocks[below & ~busy & ~first]
        cache_only = ~below & ~above & (d.refs[blocks] == 0) & ~first
        if group.cold is not None and self._nvme_takes_more():
            cache_only &= ~(group.cold.may_sink(blocks) & group.admission.may_write(group, blocks))
        yield blocks[cache_only]
        doubles = above & ~below & ~busy
        if keep_clean:
            doubles &= ~self.evictable()[np.maximum(d.page[blocks], 0)]
        yield blocks[doubles]

    def _nvme_takes_more(self) -> bool:
        group = self._group
        return group.can_write_nvme and group.nvme_room() > 0
