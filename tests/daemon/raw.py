"""A client that says exactly what a test wants, in the protocol's own words."""

from __future__ import annotations

import struct
from functools import partial

import numpy as np

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.keys import owner_tag
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.manifest import STAMP

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
SIZE = LAYOUT.block_bytes
WAIT_S = 60.0  # for an answer: a bound on hanging, not an aim


def attach(address: str, **greeting) -> Attachment:
    client = Attachment.open(address, [LAYOUT], "raw", {}, Greeting("test", **greeting))
    connection = client.connection
    connection.call = partial(connection.call, timeout_s=WAIT_S)
    connection.call_patiently = partial(connection.call_patiently, timeout_s=WAIT_S)
    return client


def key(number: int) -> bytes:
    return struct.pack("<Q", number) + bytes(24)


def block(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)


def stamps(numbers: list[int], namespace: str = "default", tokens: int = 4) -> np.ndarray:
    found = np.zeros(len(numbers), STAMP)
    found["key"] = np.frombuffer(b"".join(map(key, numbers)), "V32")
    found["tokens"], found["owner"] = tokens, owner_tag(namespace)
    return found


def put(client: Attachment, numbers: list[int], namespace: str = "default", *, keep: bool = False) -> np.ndarray:
    """Store blocks; their rows, which stay leased where `keep`."""
    rows, _ = client.reserve(0, len(numbers), WAIT_S)
    assert len(rows) == len(numbers)
    blocks = np.stack([block(number) for number in numbers])
    if client.has_slab:
        client.rows[0][rows] = blocks
    else:
        client.write_rows(0, rows, blocks, np.arange(len(rows)))
    results, _ = client.commit(0, rows, stamps(numbers, namespace), [b""] * len(numbers))
    assert (results & 3 == 1).all(), results
    if not keep:
        client.release(0, rows)
    return rows


def get(client: Attachment, number: int) -> np.ndarray | None:
    """A block's bytes, or None."""
    rows, generations = client.lease(0, key(number), WAIT_S)
    if rows[0] < 0:
        return None
    found = np.empty((1, SIZE), np.uint8)
    if client.has_slab:
        found[0] = client.rows[0][rows[0]]
        assert client.generations[0][rows[0]] == generations[0]
    else:
        client.read_rows(0, rows, found, np.zeros(1, np.int64))
    client.release(0, rows)
    return found[0]
