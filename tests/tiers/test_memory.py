"""Host memory: exact and aligned, faulted in without changing a byte, placed on nodes, and honest about what it lacks."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
import time

import numpy as np
import pytest

from kvtier.tiers import kernel_calls, numa
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.host import HostMemory
from kvtier.tiers.kernel_calls import memory_policy
from kvtier.tiers.machine import Machine, parse_list
from kvtier.tiers.memory import address_of, aligned_rows, resident_bytes
from kvtier.tiers.numa import Placement, check_numa
from kvtier.tiers.prefault import PIECE_BYTES, Prefault

PAGE = mmap.PAGESIZE
MIB = 1 << 20
PLENTY = sys.maxsize


def pages_in_memory(address: int, nbytes: int) -> np.ndarray:
    """One bool per page, after mincore."""
    flags = (ctypes.c_ubyte * (nbytes // PAGE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags) == 0
    return np.frombuffer(flags, np.uint8) & 1 == 1


def can_populate() -> bool:
    rows = aligned_rows(1, PAGE)
    try:
        kernel_calls.populate(*address_of(rows))
    except OSError:
        return False
    return True


populates = pytest.mark.skipif(not can_populate(), reason="no MADV_POPULATE_WRITE (Linux 5.14)")


# ---------------------------------------------------------------------- rows
@pytest.mark.parametrize("huge_pages", ["auto", "off"])
@pytest.mark.parametrize(
    ("rows", "row_bytes"), [(0, 64), (3, 100), (1, PAGE), (5, (2 << 20) + PAGE), (7, 3 * MIB + 123)]
)
def test_rows_are_exact_zeroed_aligned_and_writable(rows, row_bytes, huge_pages):
    made = aligned_rows(rows, row_bytes, huge_pages=huge_pages)
    assert made.shape == (rows, row_bytes) and made.flags.writeable and made.flags.c_contiguous and not made.any()
    if made.nbytes:
        assert made.ctypes.data % (2 * MIB if made.nbytes >= 2 * MIB else PAGE) == 0
    made[:] = 7
    assert int(made.sum(dtype=np.int64)) == 7 * made.nbytes


@populates
@pytest.mark.skipif(Machine().huge_page_mode() not in ("always", "madvise"), reason="no transparent huge pages here")
def test_huge_pages_are_used_reported_and_can_be_switched_off():
    size = 32 * MIB
    huge, small = aligned_rows(1, size), aligned_rows(1, size, huge_pages="off")
    for rows in (huge, small):
        kernel_calls.populate(*address_of(rows))
    assert resident_bytes([huge])[0] == resident_bytes([small])[0] == size
    assert resident_bytes([small])[1] == 0
    assert resident_bytes([huge])[1] > 0  # how many depends on how scattered the machine's free memory is


@pytest.mark.skipif(Machine().huge_pages_free() < 4, reason="no reserved huge pages here")
def test_reserved_huge_pages_are_taken_and_given_back():
    for _ in range(Machine().huge_pages_free() + 1):  # more often than there are pages
        rows = aligned_rows(3, MIB, huge_pages="reserved")
        rows[:] = 1
        assert resident_bytes([rows]) == (rows.nbytes, rows.nbytes)
        del rows


def test_more_reserved_pages_than_there_are_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"host_huge_pages='reserved': \d+ huge pages .* raise vm.nr_hugepages"):
        aligned_rows(1 << 20, 1 << 20, huge_pages="reserved")


# ---------------------------------------------------------------------- prefault
@populates
@pytest.mark.parametrize("huge_pages", ["auto", "off"])
def test_prefault_makes_every_page_of_the_slab_resident_and_none_beside_it(huge_pages):
    size = 3 * PIECE_BYTES + 5 * PAGE
    whole = aligned_rows(1, size + 8 * MIB, huge_pages=huge_pages)
    slab = whole[0, :size]
    start, _ = address_of(whole)
    kernel_calls.advise(start, whole.nbytes, kernel_calls.MADV_NOHUGEPAGE)  # else the page at the end is a huge one
    assert not pages_in_memory(start, size).any()
    work = Prefault([slab], room=lambda: PLENTY)
    assert work.wait(60) and work.state == "done" and work.done_bytes == size and not work.notice
    seen = pages_in_memory(start, size + 8 * MIB - size % PAGE)
    assert seen[: size // PAGE].all() and not seen[size // PAGE :].any() and not slab.any()


@populates
def test_the_last_huge_page_does_not_reach_past_the_slab():
    size = 8 * MIB + 3 * PAGE
    slab = aligned_rows(1, size)
    work = Prefault([slab], room=lambda: PLENTY)
    assert work.wait(60) and work.state == "done"
    mapping, end = slab.base, slab.ctypes.data + size
    assert isinstance(mapping, np.ndarray)
    assert not pages_in_memory(end, mapping.ctypes.data + mapping.nbytes - end).any()


def hammer(populate, seed: int) -> bool:
    """Whether all bytes that two users wrote stay, while the slab that they write all over is being populated."""
    size, writers = 128 * MIB, 2
    slab = aligned_rows(size // PAGE, PAGE)
    stop, written = threading.Event(), [0] * writers
    wanted = np.zeros((writers, len(slab)), np.uint8)

    def write(which: int) -> None:
        rng = np.random.default_rng((seed, which))
        while not stop.is_set():
            rows = rng.integers(0, len(slab) // writers, 64) * writers + which
            slab[rows] = wanted[which, rows] = rng.integers(1, 255, dtype=np.uint8)
            written[which] += 1

    threads = [threading.Thread(target=write, args=(which,)) for which in range(writers)]
    for thread in threads:
        thread.start()
    while min(written) == 0:
        time.sleep(0.001)
    work = Prefault([slab], room=lambda: PLENTY, populate=populate)
    assert work.wait(60) and work.state == "done"
    time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    return bool((slab == wanted.max(0)[:, None]).all())


@populates
def test_bytes_written_meanwhile_stay(seed):
    assert all(hammer(kernel_calls.populate, seed + i) for i in range(3))


def test_a_populate_that_writes_would_be_seen(seed):
    def clear(address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    assert not all(hammer(clear, seed + i) for i in range(30))  # the first nearly always shows it


def test_it_stops_at_close_after_the_piece_under_way():
    began, go, seen = threading.Event(), threading.Event(), []

    def slow(address: int, nbytes: int) -> None:
        seen.append(nbytes)
        began.set()
        go.wait(60)

    slab = aligned_rows(1, 10 * PIECE_BYTES)
    work = Prefault([slab], room=lambda: PLENTY, populate=slow)
    assert began.wait(60) and work.state == "running"
    closing = threading.Thread(target=work.close)
    closing.start()
    assert work._stop.wait(60)
    go.set()
    closing.join(60)
    assert work.wait(0) and work.state == "stopped" and seen == [PIECE_BYTES] and work.done_bytes == PIECE_BYTES


def test_pieces_cover_the_arrays_exactly_and_begin_at_pages():
    seen = []
    slab = aligned_rows(3, PIECE_BYTES + 5)
    arrays = [slab, slab[:0], slab[1:2, :10]]
    assert Prefault(arrays, room=lambda: PLENTY, populate=lambda *piece: seen.append(piece)).wait(60)
    assert all(address % PAGE == 0 for address, _ in seen)
    assert max(address + nbytes for address, nbytes in seen) == slab.ctypes.data + slab.nbytes
    assert sum(nbytes for _, nbytes in seen[:-1]) == slab.nbytes


@pytest.mark.parametrize(
    ("number", "says"), [(errno.EINVAL, "Linux 5.14"), (errno.ENOSYS, "Linux 5.14"), (errno.ENOMEM, "Cannot allocate")]
)
def test_a_kernel_that_refuses_is_a_notice_and_nothing_else(number, says):
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(number, "Cannot allocate memory" if number == errno.ENOMEM else "refused")

    slab = aligned_rows(1, 2 * PIECE_BYTES)
    work = Prefault([slab], room=lambda: PLENTY, populate=refuse)
    assert work.wait(60) and work.state == "refused" and says in work.notice and work.done_bytes == 0
    assert not pages_in_memory(*address_of(slab)).any()


def test_a_call_that_is_interrupted_is_made_again():
    left = [errno.EINTR, errno.EAGAIN]

    def hiccup(address: int, nbytes: int) -> None:
        if left:
            raise OSError(left.pop(), "again")

    work = Prefault([aligned_rows(1, PIECE_BYTES)], room=lambda: PLENTY, populate=hiccup)
    assert work.wait(60) and work.state == "done" and not left


def test_what_the_memory_limit_cannot_hold_is_refused_with_a_notice():
    slab = aligned_rows(1, 2 * PIECE_BYTES)
    work = Prefault([slab], room=lambda: slab.nbytes + 1)  # fits, but leaves nothing to anybody else
    assert work.wait(60) and work.state == "refused" and work.done_bytes == 0
    assert "8.0 MiB of the host tier are not prefaulted" in work.notice and "lower host_bytes" in work.notice
    assert not pages_in_memory(*address_of(slab)).any()


def test_room_that_shrinks_ends_it_midway():
    from kvtier.tiers import prefault

    rooms = iter([PLENTY, 0])
    slab = aligned_rows(1, prefault.CHECK_BYTES + PIECE_BYTES)
    work = Prefault([slab], room=lambda: next(rooms), populate=lambda *piece: None)
    assert work.wait(60) and work.state == "refused" and work.done_bytes == prefault.CHECK_BYTES


# ---------------------------------------------------------------------- NUMA
def fake(tmp_path, nodes: dict[int, str], *, mems: str = "0-63") -> Machine:
    """A machine whose nodes have these CPUs."""
    folder = tmp_path / "sys/devices/system/node"
    for node, cpus in nodes.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}" / "cpulist").write_text(cpus + "\n")
    (folder / "has_memory").write_text(",".join(map(str, nodes)) + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nMems_allowed_list:\t{mems}\n")
    return Machine(tmp_path)


ALL_CPUS = "0-4095"


def test_on_one_node_nothing_is_called_and_a_notice_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "bind_memory", lambda *_: pytest.fail("mbind was called"))
    monkeypatch.setattr(numa, "set_thread_policy", lambda *_: pytest.fail("set_mempolicy was called"))
    backend = CpuBackend()
    for choice in ("auto", "interleave", 0):
        memory = HostMemory(backend, numa=choice, machine=fake(tmp_path / str(choice), {0: ALL_CPUS}))
        memory.alloc(2, PAGE)
        assert memory.status()["notices"] == ["one NUMA node (0): nothing to bind"]
        assert memory.status()["numa_policy"] == "none" and memory.status()["numa_nodes"] == [0]
    backend.close(5)


@pytest.mark.parametrize(
    ("choice", "nodes", "near", "policy", "chosen"),
    [
        ("auto", {0: ALL_CPUS, 1: ""}, None, "prefer", (0,)),
        ("auto", {0: "", 1: ALL_CPUS}, None, "prefer", (1,)),
        ("auto", {0: ALL_CPUS, 1: ALL_CPUS, 2: ""}, None, "interleave", (0, 1)),
        ("auto", {0: "", 1: ""}, None, "interleave", (0, 1)),
        ("auto", {0: ALL_CPUS, 1: ""}, 1, "prefer", (1,)),
        ("auto", {0: ALL_CPUS, 1: ""}, 7, "prefer", (0,)),
        ("interleave", {0: ALL_CPUS, 2: ""}, None, "interleave", (0, 2)),
        (2, {0: ALL_CPUS, 2: ""}, None, "prefer", (2,)),
        ("2", {0: ALL_CPUS, 2: ""}, 0, "prefer", (2,)),
        ("off", {0: ALL_CPUS, 1: ""}, None, "none", (0, 1)),
    ],
)
def test_nodes_are_chosen(tmp_path, choice, nodes, near, policy, chosen):
    placement = Placement.choose(choice, near=near, machine=fake(tmp_path, nodes))
    assert (placement.policy, placement.nodes, placement.notice) == (policy, chosen, "")


def test_nodes_that_this_process_may_not_use_are_not_chosen(tmp_path):
    machine = fake(tmp_path, {0: ALL_CPUS, 1: ALL_CPUS}, mems="1")
    assert Placement.choose("auto", machine=machine).nodes == (1,)
    with pytest.raises(ConfigError, match="host_numa=0: nodes with memory for this process are 1"):
        Placement.choose(0, machine=machine)


def test_mbind_gets_the_mask_of_the_nodes(monkeypatch):
    """The syscall's own arguments, for nodes that this machine need not have."""
    seen = []
    monkeypatch.setattr(kernel_calls, "_call", lambda *call: seen.append(call))
    rows = aligned_rows(2, 3 * MIB)
    Placement("prefer", (3,)).bind(rows)
    Placement("interleave", (0, 65)).bind(rows)
    for (which, address, nbytes, policy, mask, max_nodes, flags), wanted in zip(seen, [(1, {3}), (3, {0, 65})]):
        bits = {i for i in range(1024) if mask[i // 64] >> (i % 64) & 1}
        assert which == 0 and (policy.value, bits) == wanted
        assert (address.value, nbytes.value) == address_of(rows) and max_nodes.value == 1024 and flags.value == 0


def has_policies() -> bool:
    try:
        memory_policy()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_policies(), reason="this system gives no memory policies (a container without SYS_NICE?)")
def test_the_kernel_has_the_policy_that_was_asked_for():
    """On any machine: one node can be named to the kernel too."""
    node = Machine().memory_nodes()[0]
    bound, other = aligned_rows(1, 4 * MIB), aligned_rows(1, 4 * MIB)
    Placement("prefer", (node,)).bind(bound)
    assert memory_policy(bound.ctypes.data) == (1, {node}) == memory_policy(bound.ctypes.data + bound.nbytes - 1)
    assert memory_policy(other.ctypes.data)[0] == 0
    before = memory_policy()
    with Placement("interleave", (node,)).around():
        assert memory_policy() == (3, {node})
    assert memory_policy() == before


def test_a_kernel_that_refuses_to_place_is_a_notice(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(numa, "memory_policy", refuse)
    monkeypatch.setattr(numa, "bind_memory", refuse)
    backend = CpuBackend()
    memory = HostMemory(backend, machine=fake(tmp_path, {0: "", 1: ALL_CPUS}))
    rows = memory.alloc(4, PAGE), memory.alloc(4, PAGE)
    assert [r.shape for r in rows] == [(4, PAGE)] * 2
    (notice,) = memory.status()["notices"]
    assert "nodes 1 (Operation not permitted)" in notice and "SYS_NICE" in notice
    backend.close(5)


@pytest.mark.parametrize("value", ["near", "-1", "1.5", "", True, None])
def test_unknown_choices_of_nodes_are_refused(value):
    with pytest.raises(
        ConfigError, match=f"host_numa={value!r} is unknown; choose auto, off, interleave, split or the number"
    ):
        check_numa(value)


# ---------------------------------------------------------------------- limits
def limited(tmp_path, groups: str, files: dict[str, str], available_kib: int = 1 << 20) -> Machine:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kib} kB\nHugePages_Free: 5\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(tmp_path)


def test_the_tightest_control_group_limits_the_room(tmp_path):
    machine = limited(
        tmp_path,
        "0::/a/b\n",
        {
            "a/memory.max": f"{100 * MIB}\n",
            "a/memory.current": f"{90 * MIB}\n",
            "a/memory.stat": f"anon 1\ninactive_file {40 * MIB}\n",
            "a/b/memory.max": f"{80 * MIB}\n",
            "a/b/memory.current": f"{10 * MIB}\n",
        },
    )
    assert machine.memory_limit_bytes() == 80 * MIB and machine.memory_room_bytes() == 50 * MIB


def test_the_limits_of_version_one_and_of_a_container_are_read_too(tmp_path):
    machine = limited(
        tmp_path,
        "5:cpu:/x\n4:memory:/docker/not-mounted-here\n0::/\n",
        {
            "memory/memory.limit_in_bytes": f"{64 * MIB}\n",
            "memory/memory.usage_in_bytes": f"{60 * MIB}\n",
            "memory/memory.stat": f"total_inactive_file {20 * MIB}\n",
        },
    )
    assert machine.memory_room_bytes() == 24 * MIB


def test_without_limits_the_machine_is_the_limit(tmp_path):
    files = {"memory.max": "max\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}
    machine = limited(tmp_path, "4:memory:/\n0::/\n", files, available_kib=512)
    assert machine.memory_limit_bytes() is None and machine.memory_room_bytes() == 512 << 10
    assert machine.huge_pages_free() == 5 and machine.huge_page_mode() == "unknown"


def test_lists_of_the_kernel_are_understood():
    assert parse_list("0-2,5\n") == {0, 1, 2, 5} and parse_list("") == set() == parse_list("\n")


# ---------------------------------------------------------------------- together
@populates
def test_host_memory_tells_what_became_of_it():
    backend = CpuBackend()
    memory = HostMemory(backend, numa="off")
    rows = [memory.alloc(4, 2 * MIB), memory.alloc(0, 64), memory.alloc(3, 100)]
    before = memory.status()
    assert before["prefault"] == "off" and before["prefaulted_bytes"] == 0 and before["huge_page_bytes"] is None
    memory.start_prefault()
    deadline_s = time.monotonic() + 60
    while memory.status()["prefault"] == "running" and time.monotonic() < deadline_s:
        time.sleep(0.01)
    memory.close()
    after = memory.status()
    assert after["prefault"] == "done" and after["huge_page_bytes"] is not None and after["notices"] == []
    assert after["prefaulted_bytes"] == after["prefault_total_bytes"] == sum(r.nbytes for r in rows)
    backend.close(5)


def test_memory_that_cannot_be_had_is_a_refusal_by_name():
    backend = CpuBackend()
    with pytest.raises(ConfigError, match=r"host_bytes: .* lower host_bytes"):
        HostMemory(backend, numa="off").alloc(1 << 16, 1 << 40)
    with pytest.raises(ConfigError, match="host_huge_pages='big' is unknown"):
        HostMemory(backend, huge_pages="big")
    backend.close(5)
