"""A client written after docs/protocol.md alone: if it needs more than the document says, the document is not enough.

`Client` and `name_blocks` use sockets, struct, msgpack and hashlib, and nothing of kvtier.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import socket
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest

from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import KvTierError

from ..pager.harness import Rig, values
from .inside import InsideDaemon
from .running import wait_for

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
LAYOUT = {
    "num_layers": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "block_size": 4,
    "dtype": "float32",
    "value_dim": None,
    "window": None,
    "sinks": 0,
    "name": "full",
}
BLOCK_BYTES = 2 * 2 * 4 * 4 * 4  # layers, K and V, tokens, head_dim, bytes of a float32
HEADER = struct.Struct("<IBBHQ")
HELLO, OPEN, LOOKUP, RESERVE, COMMIT, LEASE, RELEASE, READ, WRITE, PUT_SESSION, GET_SESSION, GOODBYE = (
    *(16, 17, 18, 19, 20, 21, 22),
    *(25, 26, 28, 29, 32),
)
RAW, FAILURE = 1, 255


class Refused(Exception):
    """Code, message, milliseconds to wait."""


class Client:
    """Blocking, one request at a time."""

    def __init__(self, path: str, features: list[str]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.last = 0
        self.welcome = self.ask(HELLO, min_version=1, max_version=2, features=features)

    def open(self, *, want_slab: bool, model: str = "m") -> None:
        self.opened, fds = self.ask_for_fds(
            OPEN, layouts=[LAYOUT], model_fingerprint=model, about={}, want_slab=want_slab
        )
        protection = [mmap.PROT_READ | mmap.PROT_WRITE] * (len(fds) - 1) + [mmap.PROT_READ]
        self.memory = [mmap.mmap(fd, 0, prot=prot) for fd, prot in zip(fds, protection, strict=False)]
        for fd in fds:
            os.close(fd)

    def ask(self, kind: int, payload: bytes = b"", /, **fields: object) -> dict:
        return self.ask_for_fds(kind, payload, **fields)[0]

    def of_store(self, kind: int, payload: bytes = b"", /, **fields: object) -> dict:
        return self.ask(kind, payload, epoch=self.welcome["epoch"], store=self.opened["store"], **fields)

    def ask_for_fds(self, kind: int, payload: bytes = b"", /, **fields: object) -> tuple[dict, list[int]]:
        self.last += 1
        body = msgpack.packb(fields)
        if kind == WRITE:
            body = struct.pack("<I", len(body)) + body + payload
        self.socket.sendall(HEADER.pack(len(body), 1, kind, RAW if kind == WRITE else 0, self.last) + body)
        head, fds, _, _ = socket.recv_fds(self.socket, HEADER.size, 8)
        size, version, answer, flags, request = HEADER.unpack(head + self.take(HEADER.size - len(head)))
        body = self.take(size)
        assert version == 1 and request == self.last
        if flags & RAW:
            length = struct.unpack_from("<I", body)[0]
            found = msgpack.unpackb(body[4 : 4 + length]) | {"payload": body[4 + length :]}
        else:
            found = msgpack.unpackb(body)
        if answer == FAILURE:
            raise Refused(found["code"], found["message"], found["retry_ms"])
        assert answer == kind + 128, (answer, found)
        return found, list(fds)

    def take(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            part = self.socket.recv(size - len(found))
            assert part
            found += part
        return found


def name_blocks(secret: bytes, tokens: list[int], namespace: str = "default", model: str = "m") -> list[bytes]:
    def keyed(told: bytes) -> bytes:
        return hashlib.blake2b(told, digest_size=32, key=secret).digest()

    printed = hashlib.blake2b(json.dumps(LAYOUT, sort_keys=True).encode(), digest_size=16).hexdigest()
    before, size = (
        keyed(f"kvtier-key-1|{model}|{printed}|{namespace}|{LAYOUT['block_size']}".encode()),
        LAYOUT["block_size"],
    )
    keys = []
    for first in range(0, len(tokens) - size + 1, size):
        before = keyed(before + struct.pack(f"<{size}I", *tokens[first : first + size]))
        keys.append(before)
    return keys


def tag(namespace: str) -> bytes:
    return hashlib.blake2b(namespace.encode(), digest_size=4).digest()


def store(client: Client, keys: list[bytes], blocks: list[bytes]) -> None:
    count = len(keys)
    reserved = client.of_store(RESERVE, group=0, count=count)
    slots = struct.unpack(f"<{count}i", reserved["slots"])
    for slot, block in zip(slots, blocks, strict=True):
        if client.memory:
            client.memory[0][slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] = block
        else:
            client.of_store(WRITE, block, group=0, slot=slot)
    done = client.of_store(
        COMMIT,
        group=0,
        slots=reserved["slots"],
        keys=b"".join(keys),
        parents=b"".join([bytes(32), *keys[:-1]]),
        tokens=struct.pack("<I", 4) * count,
        owners=tag("default") * count,
        hold=True,
    )
    assert list(done["results"]) == [1 + 4] * count
    client.of_store(RELEASE, group=0, slots=reserved["slots"])


def load(client: Client, keys: list[bytes]) -> list[bytes]:
    leased = client.of_store(LEASE, group=0, keys=b"".join(keys), wait_ms=5000)
    slots = struct.unpack(f"<{len(keys)}i", leased["slots"])
    assert min(slots) >= 0
    if client.memory:
        found = [client.memory[0][slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] for slot in slots]
        now = [client.memory[1][8 * slot : 8 * slot + 8] for slot in slots]
        assert b"".join(now) == leased["generations"]
    else:
        whole = client.of_store(READ, group=0, slots=leased["slots"])["payload"]
        found = [whole[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(len(keys))]
    client.of_store(RELEASE, group=0, slots=leased["slots"])
    return found


def test_the_frame_in_the_document_is_that_frame():
    told = re.search(r"```\n([0-9a-f \n]+)```", DOCUMENT.read_text())
    assert told is not None
    body = msgpack.packb({"min_version": 1, "max_version": 2, "features": ["bytes"]})
    assert bytes.fromhex(told[1]) == HEADER.pack(len(body), 1, HELLO, 0, 1) + body


@pytest.mark.parametrize("want_slab", [True, False])
def test_a_client_after_the_document_stores_and_reads_blocks(tmp_path, want_slab):
    with InsideDaemon(tmp_path, host_bytes=64 * BLOCK_BYTES, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as daemon:
        path = daemon.address.removeprefix("unix://")
        one, two = Client(path, ["slab", "bytes"]), Client(path, ["bytes"])
        one.open(want_slab=want_slab)
        two.open(want_slab=False)
        assert bool(one.memory) == want_slab == one.opened["has_slab"]
        secret = one.welcome["namespaces"].get("default", b"")
        keys = name_blocks(secret, list(range(100, 113)))
        blocks = [np.random.default_rng(i).bytes(BLOCK_BYTES) for i in range(len(keys))]
        store(one, keys, blocks)
        found = two.ask(LOOKUP, store=two.opened["store"], keys=b"".join([*keys, bytes(32)]))
        assert (list(found["held"]), found["num_keys"]) == ([1, 1, 1], 3)
        assert load(two, keys) == blocks and load(one, keys) == blocks
        record = {"version": 1, "namespace": "default", "token_ids": struct.pack("<13I", *range(100, 113))}
        one.of_store(PUT_SESSION, session_id="s", record=record | {"num_computed": 12, "extra": {"who": "me"}})
        assert two.of_store(GET_SESSION, session_id="s")["record"]["extra"] == {"who": "me"}
        one.ask(GOODBYE, epoch=one.welcome["epoch"])
        two.ask(GOODBYE, epoch=two.welcome["epoch"])


def test_what_a_pager_computed_is_found_and_read_under_the_names_of_the_document(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=1 << 20) as daemon:
        rig, tokens = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32), list(range(100, 121))
        rig.prefill(rig.start(tokens))
        client = Client(daemon.address.removeprefix("unix://"), ["bytes"])
        client.open(want_slab=False, model="rig")
        keys = name_blocks(client.welcome["namespaces"].get("default", b""), tokens, model="rig")

        def are_held() -> bool:
            rig.pager.poll()
            return client.ask(LOOKUP, store=client.opened["store"], keys=b"".join(keys))["num_keys"] == len(keys)

        wait_for(are_held, 30.0)
        blocks = [np.frombuffer(block, "<f4").reshape(2, 2, 1, 4, 4) for block in load(client, keys)]
        keys_of_layer_0 = np.concatenate([block[0, 0, 0, :, 0] for block in blocks])
        assert keys_of_layer_0.tolist() == values(tokens)[: len(keys_of_layer_0)].tolist()
        client.ask(GOODBYE, epoch=client.welcome["epoch"])
        rig.close()


def test_every_code_that_a_failure_can_have_stands_in_the_document():
    own = {
        "unsupported_model",
        "unpackable",
        "invariant",
        "session_changed",
    }  # of engines and pagers; never said by a daemon
    codes, kinds = set(), [KvTierError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__ == KvTierError.__module__:  # who asks an inspector has others, which no daemon says
            codes.add(kind.code)
    assert len(codes) > 10
    assert not {code for code in codes - own if f"`{code}`" not in DOCUMENT.read_text().split("## Failures")[1]}
