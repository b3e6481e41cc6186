"""Node links: which free slots to write where host memory is split over several NUMA nodes.

Every node has a link to the device, the nearer the faster, and copies that are under way keep links busy. Slots are taken so
that the last of them is written soonest: from the nearest node, and from others as soon as its link has so much to do that
theirs would be done before. A block is later read over the link of the node that it lies on; blocks do not move between nodes.
Rates are those that firmware tells by distances, not measured. Pure arithmetic: no memory, no clock.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_IntArray = npt.NDArray[np.int64]


class NodeLinks:
    """Of one slab. `node_of`: per slot its node, the nearest is 0; `rates`: of the nodes' links; `busy`: slots being copied."""

    def __init__(self, node_of: _IntArray, rates: tuple[float, ...], busy: Callable[[], _IntArray]) -> None:
        self._node_of, self._rates, self._busy = node_of, rates, busy

    def choose(self, free: _IntArray, n: int) -> _IntArray:
        """n of these slots, ascending; all of them where there are fewer.

        Cost: a sort of n slots per node.
        """
        if n <= 0 or len(free) <= n:
            return free[: max(0, n)]
        loads = np.bincount(self._node_of[self._busy()], minlength=len(self._rates))
        nodes = self._node_of[free]
        slots, done = [], []
        for node, rate in enumerate(self._rates):
            mine = free[nodes == node][:n]
            slots.append(mine)
            done.append((loads[node] + np.arange(1, len(mine) + 1)) / rate)
        soonest = np.argsort(np.concatenate(done), kind="stable")[:n]  # of two that are done together the nearer
        return np.sort(np.concatenate(slots)[soonest])
