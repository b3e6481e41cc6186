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


def check_numa(numa: str | int) -> str | int:
    """auto, off, interleave, or a node's number (as text too). Raises ConfigError."""
    text = str(numa).lower()
    if text in ("auto", "off", "interleave"):
        return text
    if text.isdecimal() and not isinstance(numa, bool):
        return int(text)
    raise ConfigError(f"host_numa={numa!r} is unknown; choose auto, off, interleave or the number of a node")


@dataclass(frozen=True, slots=True)
class Placement:
    """Nodes that host memory should lie on. `policy`: none, prefer (one node) or interleave (page by page over several)."""

    policy: str = "none"
    nodes: tuple[int, ...] = ()
    notice: str = ""

    @classmethod
    def choose(cls, numa: str | int, *, near: int | None = None, machine: Machine | None = None) -> Placement:
        """auto: the node `near` the device; without one, the node whose CPUs this process may run on, or all of those
        nodes in turn.

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
        if isinstance(numa, int):
            nodes: tuple[int, ...] = (numa,)
        elif numa == "interleave":
            nodes = there
        else:
            nodes = (near,) if near in there and near is not None else machine.nodes_of_cpus()
        return cls("prefer" if len(nodes) == 1 else "interleave", nodes)

    def bind(self, rows: npt.NDArray[np.uint8]) -> None:
        """For pages of these rows that nobody has touched yet. Raises OSError when the kernel refuses."""
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
