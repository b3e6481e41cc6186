"""A client's mapping of the slab is faulted in ahead where that takes no memory, and only there."""

from __future__ import annotations

import numpy as np

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.memory import resident_bytes
from kvtier.tiers.shared import is_allocated, make_rows

from .running import Pagerd, wait_for

LAYOUT = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=64, dtype="float32")  # 512 KiB
HOST_BYTES = 8 << 20


def attach(daemon: Pagerd) -> Attachment:
    return Attachment.open(daemon.address, [LAYOUT], "populating", {}, Greeting("test"))


def test_a_memfd_is_allocated_once_every_page_of_it_was_used():
    rows, fd = make_rows(16, 4096, name="test", huge_pages=True)
    assert not is_allocated(fd)
    rows[:15] = 1
    assert not is_allocated(fd)
    rows[15, 7] = 1
    assert is_allocated(fd)


def test_a_slab_that_is_there_is_mapped_without_changing_a_byte(tmp_path):
    with Pagerd(tmp_path, host_bytes=HOST_BYTES) as daemon:
        first = attach(daemon)
        rows, _ = first.reserve(0, 1, 60.0)
        first.rows[0][rows[0]] = 7

        def populating() -> Attachment | None:  # the daemon's own prefault may be under way still
            found = attach(daemon)
            if found.populate() is not None:
                return found
            found.goodbye()  # how many clients it takes is limited
            return None

        second = wait_for(populating)
        populated = second.populate()
        assert populated is not None and populated.wait(60.0) and populated.state == "done", populated
        assert resident_bytes(second.rows)[0] == second.rows[0].nbytes
        assert (second.rows[0][rows[0]] == 7).all()
        for client in (first, second):
            client.goodbye()


def test_a_slab_that_is_not_there_is_left_to_be_taken_as_it_is_used(tmp_path):
    with Pagerd(tmp_path, host_bytes=HOST_BYTES, options=("--no-prefault",)) as daemon:
        client = attach(daemon)
        assert client.populate() is None
        assert resident_bytes(client.rows)[0] < HOST_BYTES // 2
        assert not np.any(client.rows[0][0])
        client.goodbye()
