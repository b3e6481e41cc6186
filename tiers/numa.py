"""Where host memory lies on a machine with several NUMA nodes: choose the nodes once, then ask the kernel for them.

Always a preference, never a must: a node that is full then costs speed; under a strict policy it would cost the process
(the kernel kills who cannot get a page). On one node there is nothing to choose and nothing is called.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import ConfigError
from .kernel_calls import MPOL_INTERLEAVE, MPOL_PREFERRED, bind_memory, memory_policy, set_thread_policy
from .machine import Machine
from .memory import address_of

_LOCAL, _FAR = 10.0, 20.0  # distances as firmware tells them: of a node to itself, and where it does not tell


def check_numa(numa: str | int) -> str | int:
    """auto, off, interleave, split, or a node's number (as text too). Raises ConfigError."""
    text = str(numa).lower()
    if text in ("auto", "off", "interleave", "split"):
        return text
    if text.isdecimal() and not isinstance(numa, bool):
        return int(text)
    raise ConfigError(f"host_numa={numa!r} is unknown; choose auto, off, interleave, split or the number of a node")


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes that host memory should lie on.

    `policy`: none, prefer (one node), interleave (page by page over several) or split (as many rows in a row on each as on the
    others, so that it is known where a row is).
    """

    policy: str = "none"
    nodes: tuple[int, ...] = ()  # of split the nearest first
    notice: str = ""
    rates: tuple[float, ...] = ()  # of split: what may be copied from and to each node, against the nearest

    @classmethod
    def choose(cls, numa: str | int, *, near: int | None = None, machine: Machine | None = None) -> Placement:
        """auto: the node `near` the device; without one, the node whose CPUs this process may run on, or all of those
        nodes in turn. split: all nodes, that one or the first of those nearest.

        Raises: ConfigError for a node that is not there.
        """
        machine, numa = machine or Machine(), check_numa(numa)
        there = machine.memory_nodes()
        if isinstance(numa, int) and numa not in there:
            raise ConfigError(f"host_numa={numa}: nodes with memory for this process are {', '.join(map(str, there))}")
        if numa == "off":
            return cls(nodes=there)
        if len(there) == 1:
            return cls(nodes=there, notice=f"one NUMA node ({there[0]}): nothing to bind")
        if numa == "split":
            return cls._split(near if near in there else machine.nodes_of_cpus()[0], machine)
        if isinstance(numa, int):
            nodes: tuple[int, ...] = (numa,)
        elif numa == "interleave":
            nodes = there
        else:
            nodes = (near,) if near in there and near is not None else machine.nodes_of_cpus()
        return cls("prefer" if len(nodes) == 1 else "interleave", nodes)

    @classmethod
    def _split(cls, near: int | None, machine: Machine) -> Placement:
        assert near is not None
        distance = machine.distances(near)
        nodes = tuple(sorted(machine.memory_nodes(), key=lambda node: (distance.get(node, _FAR), node)))
        return cls("split", nodes, rates=tuple(_LOCAL / distance.get(node, _FAR) for node in nodes))

    def nearest(self) -> Placement:
        """Of memory that is not spread."""
        return Placement("prefer", self.nodes[:1]) if self.policy == "split" else self

    def parts(self, num_rows: int) -> npt.NDArray[np.int64] | None:
        """Per row the position in `nodes` of where it lies; None where that is not known of single rows."""
        return np.arange(num_rows) * len(self.nodes) // max(1, num_rows) if self.policy == "split" else None

    def bind(self, rows: npt.NDArray[np.uint8]) -> None:
        """For pages of these rows that nobody has touched yet. Raises OSError when the kernel refuses."""
        parts = self.parts(len(rows))
        if parts is not None:
            for position, node in enumerate(self.nodes):
                first, end = np.searchsorted(parts, [position, position + 1])
                Placement("prefer", (node,)).bind(rows[first:end])
            return
        address, nbytes = address_of(rows)
        if self.policy != "none" and nbytes:
            first = address // mmap.PAGESIZE * mmap.PAGESIZE
            bind_memory(first, address + nbytes - first, self._number, self.nodes)

    @contextmanager
    def around(self) -> Iterator[None]:
        """For what this thread faults in meanwhile, also inside a driver. Raises OSError before anything else is done."""
        if self.policy == "none":
            yield
            return
        before, nodes = memory_policy()
        set_thread_policy(self._number, self.nodes)
        try:
            yield
        finally:
            set_thread_policy(before, nodes)

    @property
    def _number(self) -> int:
        return MPOL_PREFERRED if self.policy == "prefer" else MPOL_INTERLEAVE
