"""Slots on several NUMA nodes, on made-up machines of two and four: nearest first, and away from links that are busy."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.node_links import NodeLinks
from kvtier.tiers import host, numa
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.host import HostMemory
from kvtier.tiers.machine import Machine
from kvtier.tiers.numa import Placement

ALL_CPUS = "0-4095"


def fake(tmp_path, distances: dict[int, str], *, ours: int = 0) -> Machine:
    """A machine with these nodes; this process may run on the CPUs of one."""
    folder = tmp_path / "sys/devices/system/node"
    for node, told in distances.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}" / "cpulist").write_text(ALL_CPUS if node == ours else "")
        (folder / f"node{node}" / "distance").write_text(told + "\n")
    for name in ("has_memory", "online"):
        (folder / name).write_text(",".join(map(str, distances)) + "\n")
    return Machine(tmp_path)


TWO = {0: "10 20", 1: "20 10"}
FOUR = {0: "10 16 32 32", 1: "16 10 32 32", 2: "32 32 10 16", 3: "32 32 16 10"}


def links(node_of: list[int], rates: tuple[float, ...], busy: list[int] | None = None) -> NodeLinks:
    return NodeLinks(np.array(node_of), rates, lambda: np.array(busy or [], np.int64))


def chosen(nodes: NodeLinks, free: list[int], n: int) -> list[int]:
    return nodes.choose(np.array(free), n).tolist()


def test_the_nearest_node_is_taken_first():
    assert chosen(links([1, 1, 0, 0], (1.0, 0.5)), [0, 1, 2, 3], 1) == [2]
    assert chosen(links([0, 0, 1, 1], (1.0, 1.0)), [0, 1, 2, 3], 1) == [0]  # as fast: the nearer


def test_many_slots_are_shared_out_by_what_the_links_carry():
    node_of = [0] * 30 + [1] * 30
    taken = chosen(links(node_of, (1.0, 0.5)), list(range(60)), 30)
    assert sum(slot < 30 for slot in taken) == 20
    four = [node for node in range(4) for _ in range(16)]
    taken = chosen(links(four, (1.0, 0.5, 0.25, 0.25)), list(range(64)), 16)
    assert [sum(four[slot] == node for slot in taken) for node in range(4)] == [8, 4, 2, 2]


def test_a_busy_link_is_left_alone_until_the_others_are_as_busy():
    node_of = [0] * 10 + [1] * 10
    busy = [0, 1, 2, 3, 4]  # five slots of the near node are being copied
    free = [*range(5, 10), *range(10, 20)]
    assert chosen(links(node_of, (1.0, 0.5), busy), free, 2) == [10, 11]
    assert chosen(links(node_of, (1.0, 0.5), busy), free, 4) == [5, 10, 11, 12]


def test_what_is_short_on_one_node_is_taken_from_the_other():
    assert chosen(links([0, 1, 1, 1], (1.0, 0.1)), [0, 1, 2, 3], 3) == [0, 1, 2]
    assert chosen(links([0, 1], (1.0, 0.1)), [0, 1], 5) == [0, 1] and chosen(links([0], (1.0,)), [0], 0) == []


@pytest.mark.parametrize(
    ("distances", "ours", "near", "nodes", "rates"),
    [
        (TWO, 0, None, (0, 1), (1.0, 0.5)),
        (TWO, 0, 1, (1, 0), (1.0, 0.5)),
        (FOUR, 2, None, (2, 3, 0, 1), (1.0, 0.625, 0.3125, 0.3125)),
        ({0: "", 1: ""}, 1, None, (0, 1), (0.5, 0.5)),  # a firmware that tells nothing
    ],
)
def test_a_split_lies_on_all_nodes_the_nearest_first(tmp_path, distances, ours, near, nodes, rates):
    placement = Placement.choose("split", near=near, machine=fake(tmp_path, distances, ours=ours))
    assert (placement.policy, placement.nodes, placement.rates) == ("split", nodes, rates)
    parts = placement.parts(4 * len(nodes) + 1)
    assert parts is not None and (np.diff(parts) >= 0).all()
    assert set(np.bincount(parts).tolist()) <= {4, 5}


def test_each_part_of_a_split_slab_is_bound_to_its_node_and_staging_to_the_nearest(tmp_path, monkeypatch):
    bound: list[tuple[int, tuple[int, ...]]] = []
    monkeypatch.setattr(numa, "bind_memory", lambda address, nbytes, policy, nodes: bound.append((nbytes, nodes)))
    monkeypatch.setattr(numa, "memory_policy", lambda: (0, ()))
    monkeypatch.setattr(numa, "set_thread_policy", lambda *_: None)
    memory = HostMemory(backend := CpuBackend(), numa="split", machine=fake(tmp_path, TWO, ours=1))
    memory.alloc(8, 4096, spread=True)
    memory.alloc(8, 4096)
    assert bound == [(4 * 4096, (1,)), (4 * 4096, (0,)), (8 * 4096, (1,))]
    assert memory.status()["numa_policy"] == "split"
    backend.close(5)


def test_a_pager_writes_to_the_nearest_node_first_and_to_the_other_while_its_link_is_busy(tmp_path, monkeypatch):
    machine = fake(tmp_path, TWO)
    monkeypatch.setattr(host, "Machine", lambda: machine)
    monkeypatch.setattr(numa, "bind_memory", lambda *_: None)
    monkeypatch.setattr(numa, "memory_policy", lambda: (0, ()))
    monkeypatch.setattr(numa, "set_thread_policy", lambda *_: None)
    layout = KVLayout(1, 1, 8, block_size=16, dtype="float32")
    config = PagerConfig(
        device_bytes=8 * layout.block_bytes,
        host_bytes=40 * layout.block_bytes,
        backend="cpu",
        staging_bytes=0,
        host_numa="split",
    )
    with Pager.open(layout, config) as pager:
        group = pager._core.groups[0]
        half = len(group.host) // 2
        first = group.host.take_free(3)
        assert (first < half).sum() == 2  # of three, two are done on the near link when one is on the far one
        group.host.stage(first, np.arange(3))
        monkeypatch.setattr(group, "_slots_in_flight", lambda: first)
        assert group.host.links is not None
        group.host.links._busy = group._slots_in_flight
        assert (group.host.take_free(1) < half).all()
        group.host.links._busy = lambda: np.arange(half)
        assert (group.host.take_free(4) >= half).all()
        group.host.drop(first)
