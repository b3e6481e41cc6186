"""What this machine lets host memory be: page sizes, NUMA nodes, limits. Reads /proc and /sys, changes nothing.

Every answer is of the moment it is asked for. `root` stands for / and lets tests describe other machines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NODES = "sys/devices/system/node"
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True, slots=True)
class Machine:
    """Questions to the kernel's files; what cannot be read counts as not there."""

    root: Path = Path("/")

    def huge_page_mode(self) -> str:
        """Of transparent huge pages: always, madvise, never; "unknown" where the kernel has none."""
        chosen = re.search(r"\[(\w+)\]", self._text("sys/kernel/mm/transparent_hugepage/enabled"))
        return chosen[1] if chosen else "unknown"

    def huge_page_bytes(self) -> int:
        """Size of a reserved huge page; 2 MiB where the kernel does not say."""
        return self._meminfo("Hugepagesize") or 2 << 20

    def huge_pages_free(self) -> int:
        """Reserved huge pages (vm.nr_hugepages) that nobody has taken or been promised."""
        text = self._text("proc/meminfo")
        free = re.search(r"^HugePages_Free:\s+(\d+)", text, re.M)
        promised = re.search(r"^HugePages_Rsvd:\s+(\d+)", text, re.M)
        return max(0, (int(free[1]) if free else 0) - (int(promised[1]) if promised else 0))

    # ------------------------------------------------------------------ NUMA
    def memory_nodes(self) -> tuple[int, ...]:
        """Nodes with memory that this process may use, ascending; (0,) where the kernel names none."""
        nodes = parse_list(self._text(f"{_NODES}/has_memory")) or parse_list(self._text(f"{_NODES}/online"))
        allowed = re.search(r"^Mems_allowed_list:\s*(\S+)", self._text("proc/self/status"), re.M)
        if allowed:
            nodes &= parse_list(allowed[1])
        return tuple(sorted(nodes)) or (0,)

    def nodes_of_cpus(self) -> tuple[int, ...]:
        """Nodes with memory whose CPUs this process may run on; all its memory nodes where that is not known."""
        mine, found = os.sched_getaffinity(0), []
        for node in self.memory_nodes():
            if parse_list(self._text(f"{_NODES}/node{node}/cpulist")) & mine:
                found.append(node)
        return tuple(found) or self.memory_nodes()

    def distances(self, node: int) -> dict[int, float]:
        """From that node to every node that is online, as firmware tells them: 10 is itself. Empty where it does not."""
        online = sorted(parse_list(self._text(f"{_NODES}/online")))
        told = self._text(f"{_NODES}/node{node}/distance").split()
        return {other: float(one) for other, one in zip(online, told, strict=False) if float(one) > 0}

    def node_of_pci(self, address: str) -> int | None:
        """The node that a PCI device hangs on, or None where the machine does not say."""
        text = self._text(f"sys/bus/pci/devices/{address.lower()}/numa_node").strip()
        return int(text) if text.isdecimal() else None  # -1: no node

    # ------------------------------------------------------------------ limits
    def memory_limit_bytes(self) -> int | None:
        """The tightest memory limit of the control groups that this process is in, or None."""
        return min((limit for limit, _ in self._groups()), default=None)

    def memory_room_bytes(self) -> int:
        """What can still be taken before the machine or a control group runs out; page cache that can go counts as free.

        Cost: some 0.1 ms.
        """
        rooms = [max(0, limit - used) for limit, used in self._groups()]
        return min([self._meminfo("MemAvailable"), *rooms])

    def _groups(self) -> Iterator[tuple[int, int]]:
        """(limit, bytes in use that cannot be dropped) of every control group above this process that has a limit."""
        for line in self._text("proc/self/cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                mount, names = self.root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                mount = self.root / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = mount / path.lstrip("/")
            if not folder.is_dir():  # in a container the path is that of the host, the mount its own
                folder = mount
            while True:
                limit, used = _number(folder / names[0]), _number(folder / names[1])
                if limit is not None and limit < _NO_LIMIT:
                    idle = re.search(rf"^{names[2]} (\d+)", _read(folder / "memory.stat"), re.M)
                    yield limit, max(0, (used or 0) - (int(idle[1]) if idle else 0))
                if folder == mount:
                    break
                folder = folder.parent

    def _meminfo(self, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", self._text("proc/meminfo"), re.M)
        return int(found[1]) << 10 if found else 0

    def _text(self, name: str) -> str:
        return _read(self.root / name)


def parse_list(text: str) -> set[int]:
    """Numbers of the kernel's lists: "0-2,5" is {0, 1, 2, 5}."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None
