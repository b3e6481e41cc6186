"""What is fuzzed: everything of ours that reads bytes or settings from outside, and the errors that it documents.

A target is made once and then fed with one generator; each call is one bad (or, by chance, good) input.
"""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from daemon_requests import daemon_requests
from mutate import NASTY_TEXT, any_value, mutated_bytes, mutated_value

from kvtier.pager.config import load_config
from kvtier.pager.daemon.secret_files import write_new_secret
from kvtier.pager.daemon.settings import load_daemon_config
from kvtier.pager.protocol import STATUS_REPLY, encode, read_frame
from kvtier.pager.sessions import SessionEntry
from kvtier.pager.wire import frames as wire
from kvtier.pager.wire import messages
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError, KvTierError, ProtocolError
from kvtier.tiers.layout import KVLayout, parse_bytes
from kvtier.tiers.nvme import identity as store_identity
from kvtier.tiers.nvme.journal import framed
from kvtier.tiers.nvme.layout import Geometry, Trailer
from kvtier.tiers.nvme.maintenance import stored_identity
from kvtier.tiers.nvme.manifest import STAMP, _replay
from kvtier.tiers.nvme.status import read_store_status
from kvtier.tiers.nvme.store import NvmeTier, StoreIdentity

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32")
IDENTITY = StoreIdentity("fuzz", (LAYOUT,))
Call = Callable[[random.Random], object]


@dataclass(frozen=True)
class Target:
    """`make` yields the function that takes one input. `inputs` are those of the suite; the soak takes more."""

    name: str
    inputs: int
    errors: tuple[type[BaseException], ...]
    make: Callable[[Path], Any]


class Received:
    """The end of a socket on which these bytes have come and nothing more."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def recv(self, size: int) -> bytes:
        part = self._raw[self._at : self._at + size]
        self._at += len(part)
        return part


@contextmanager
def frames(folder: Path) -> Iterator[Call]:
    bodies = [{}, {"version": 1, "pages": [1, 2, 3], "x": b"\0" * 40, "y": {"z": None, "f": 1.5}}, [[1], ["a"] * 20]]
    good = [encode(STATUS_REPLY, 7, body) for body in bodies]

    def call(choose: random.Random) -> None:
        read_frame(Received(mutated_bytes(choose, good[int(choose.random() * len(good))])))  # type: ignore[arg-type]

    yield call


@contextmanager
def daemon_frames(folder: Path) -> Iterator[Call]:
    """What pagerd and its clients send: headers, maps and the fields of every request, changed as bytes or as values."""
    samples = {int: 3, str: "a", bytes: b"k" * 32, list: ["a", 1], dict: {"a": b"s"}, bool: True, float: 0.5}
    good = []
    for kind in messages.REQUESTS:
        good.append((kind, {name: samples[wanted] for name, wanted in messages._kinds(kind).items()}))
    packed = [(kind, wire.pack(kind.KIND, 7, fields)) for kind, fields in good]

    def call(choose: random.Random) -> None:
        at = int(choose.random() * len(good))
        kind, raw = packed[at]
        if choose.random() < 0.3:
            raw = raw[: wire.HEADER.size] + msgpack.packb(
                mutated_value(choose, good[at][1]), default=str, unicode_errors="surrogatepass"
            )
        else:
            raw = mutated_bytes(choose, raw)
        if len(raw) < wire.HEADER.size:
            return  # the connection waits for the rest
        header = wire.parse_header(raw)
        body = memoryview(raw)[wire.HEADER.size :]
        if header.is_raw:
            if len(body) < wire.META_LENGTH.size:
                return
            size = wire.meta_bytes(header, body)
            body = body[wire.META_LENGTH.size :][:size]
        messages.from_fields(messages.REQUEST_BY_KIND.get(header.kind, kind), wire.unpack(body))

    yield call


@contextmanager
def settings(folder: Path) -> Iterator[Call]:
    good: dict[str, Any] = dict(
        device_bytes="1GiB",
        host_bytes=1 << 30,
        nvme_path="/tmp/store",
        nvme_bytes="10GiB",
        durability="batch",
        nvme_queue_depth=8,
        nvme_segment_bytes="64MiB",
        nvme_codec="lz4",
        policy="sliding_window",
        window=64,
        sinks=4,
        low_watermark=0.1,
        high_watermark=0.2,
        staging_bytes=0,
        host_prefault=True,
        host_huge_pages="auto",
        host_numa="off",
        namespace_secrets={"a": "00ff"},
        namespace_quotas={"a": "1GiB"},
    )

    def call(choose: random.Random) -> None:
        values = mutated_value(choose, good)
        if isinstance(values, dict):
            load_config(None, env={}, **{str(name): value for name, value in values.items()})

    yield call


@contextmanager
def daemon_settings(folder: Path) -> Iterator[Call]:
    """pagerd's file, changed as text, and its settings, changed as values."""
    secret, token = folder / "secret", "blake2b:" + "0" * 64
    write_new_secret(secret)
    text = f"""host_bytes = "1GiB"
nvme_path = "/tmp/store"
nvme_bytes = "10GiB"
socket = "/run/x.sock"
socket_mode = 0o660
max_models = 2
root_secret_file = "{secret}"
log_level = "info"
[limits]
connections = 7
hello_s = 5
bytes_in_flight = "2MiB"
drain_s = 1.5
[namespaces.a]
uids = [1, 2]
tokens = ["{token}"]
host_floor = "1MiB"
pins = 3
"""
    path, good = folder / "pagerd.toml", tomllib.loads(text)

    def call(choose: random.Random) -> None:
        if choose.random() < 0.5:
            path.write_bytes(mutated_bytes(choose, text.encode()))
            load_daemon_config(path, env={})
        else:
            values = mutated_value(choose, good)
            if isinstance(values, dict):
                path.write_text("")
                load_daemon_config(path, env={}, **{str(name): value for name, value in values.items()})

    yield call


@contextmanager
def environment(folder: Path) -> Iterator[Call]:
    names = [
        "HOST_BYTES",
        "WINDOW",
        "LOW_WATERMARK",
        "HOST_PREFAULT",
        "NAMESPACE_QUOTAS",
        "NVME_CODEC",
        "HOST_NUMA",
        "X",
    ]

    def call(choose: random.Random) -> None:
        text = choose.choice(NASTY_TEXT) if choose.random() < 0.3 else mutated_text(choose, "a=1GiB,b=2")
        load_config(
            None, env={f"KVTIER_{choose.choice(names)}": text}, device_bytes="1GiB", nvme_path="/x", host_bytes=9
        )

    yield call


def mutated_text(choose: random.Random, text: str) -> str:
    return mutated_bytes(choose, text.encode()).decode(errors="replace")


@contextmanager
def toml(folder: Path) -> Iterator[Call]:
    text = b"""device_bytes = "1GiB"
host_bytes = 4096 # a few blocks
nvme_path = '/tmp/store'
low_watermark = 0.05
nvme_codec = ["lz4"]
[namespace_quotas]
a = "1GiB"
"""
    path = folder / "kvtier.toml"

    def call(choose: random.Random) -> None:
        path.write_bytes(mutated_bytes(choose, text))
        load_config(path, env={})

    yield call


@contextmanager
def sizes(folder: Path) -> Iterator[Call]:
    def call(choose: random.Random) -> None:
        asked = any_value(choose) if choose.random() < 0.3 else mutated_text(choose, "12.5 GiB")
        assert parse_bytes(asked) >= 0

    yield call


@contextmanager
def journal(folder: Path) -> Iterator[Call]:
    """Torn and flipped bytes, and records that pass their checksum and are still not ours."""
    stamps = np.zeros(3, STAMP)
    slots = np.arange(3, dtype="<i8").tobytes()
    records: list[dict[str, Any]] = [
        {"op": "put", "group": 0, "slots": slots, "stamps": stamps.tobytes()},
        {"op": "move", "group": 0, "left": slots, "slots": slots, "stamps": stamps.tobytes()},
        {"op": "drop", "group": 0, "slots": slots},
        {"op": "session", "id": "a", "record": {"version": 1, "token_ids": b"\0" * 8}},
        {"op": "forget", "id": "a"},
        {"op": "commit"},
    ]
    whole = b"".join(map(framed, records))

    def call(choose: random.Random) -> None:
        how = choose.random()
        if how < 0.4:
            _replay(mutated_bytes(choose, whole))
            return
        record = mutated_value(choose, choose.choice(records))
        if how < 0.5:
            raw = mutated_bytes(choose, msgpack.packb(record, default=str, unicode_errors="surrogatepass"))
            _replay(_frame_of(raw))
        else:
            _replay(_frame_of(msgpack.packb(record, default=str, unicode_errors="surrogatepass")))

    yield call


def _frame_of(body: bytes) -> bytes:
    import crc32c

    return len(body).to_bytes(4, "little") + crc32c.crc32c(body).to_bytes(4, "little") + body


@contextmanager
def session_records(folder: Path) -> Iterator[Call]:
    good = {
        "version": 1,
        "namespace": "default",
        "token_ids": b"\1\0\0\0" * 5,
        "num_computed": 5,
        "extra": {"a": [1]},
        "tail_keys": [b"k" * 32],
        "summary": {"tokens": 5},
    }

    def call(choose: random.Random) -> None:
        entry = SessionEntry.from_record("s", mutated_value(choose, good))
        assert 0 <= entry.num_computed <= len(entry.token_ids)

    yield call


@contextmanager
def store_metadata(folder: Path) -> Iterator[Call]:
    """store.json and zarr.json: changed bytes, and changed values under a sum that is right."""
    path = folder / "store"
    backend = CpuBackend()
    NvmeTier.open(path, IDENTITY, num_slots=[64], backend=backend).close()
    backend.close(5)
    files = [path / "store.json", path / "blocks.zarr" / "zarr.json", path / "blocks.zarr" / "g0" / "zarr.json"]
    pristine = {file: file.read_bytes() for file in files}
    readers: list[Callable[[], object]] = [
        lambda: store_identity.check_identity(path, IDENTITY),
        lambda: store_identity.stored_geometries(path, IDENTITY),
        lambda: store_identity.stored_codecs(path, IDENTITY),
        lambda: store_identity.grow_arrays(path, IDENTITY, [8]),
        lambda: stored_identity(path),
        lambda: read_store_status(path),
    ]

    def call(choose: random.Random) -> None:
        file = files[0] if choose.random() < 0.7 else choose.choice(files)
        if choose.random() < 0.3:
            file.write_bytes(mutated_bytes(choose, pristine[file]))
        else:
            fields = json.loads(pristine[file])
            fields.pop("sum", None)
            fields = mutated_value(choose, mutated_value(choose, fields, is_json=True), is_json=True)
            if file == files[0] and isinstance(fields, dict):
                fields["sum"] = store_identity._sum_of(fields)
            file.write_text(json.dumps(fields))
        try:
            choose.choice(readers)()
        finally:
            file.write_bytes(pristine[file])

    yield call
    shutil.rmtree(path)


@contextmanager
def trailers(folder: Path) -> Iterator[Call]:
    """What lies behind a block, and the index at the front of a segment."""
    geometry = Geometry.for_room(LAYOUT, 64)
    sums = np.arange(2, dtype="<u8")
    tail = geometry.tail(Trailer(b"k" * 32, 3, 5, 16, sums, 9))
    header = geometry.header(np.zeros(geometry.slots_per_segment, np.uint64))

    def call(choose: random.Random) -> None:
        if choose.random() < 0.5:
            geometry.read_tail(mutated_bytes(choose, tail))
        else:
            raw = mutated_bytes(choose, header)[: len(header)].ljust(len(header), b"\0")
            geometry.judge_header(np.frombuffer(raw, np.uint8))

    yield call


@contextmanager
def archives(folder: Path) -> Iterator[Call]:
    """Session archives: a zip with Zarr in it."""
    from kvtier.engine.archive import export_sequence, import_sequence
    from kvtier.pager.config import PagerConfig
    from kvtier.pager.lease import Span
    from kvtier.pager.pager import Pager

    config = PagerConfig(device_bytes=64 * LAYOUT.block_bytes, host_bytes=0, backend="cpu")
    with Pager.open(LAYOUT, config, model_fingerprint="fuzz") as pager:
        seq = pager.begin()
        pager.append(seq, list(range(40)))
        with pager.lease([Span(seq, 0, 40)]) as lease:
            pager.device_rows(0)[:] = 7
            lease.commit()
        export_sequence(pager, seq, folder / "good", {"said": 1})
        whole, path = (folder / "good").read_bytes(), folder / "bad"

        def call(choose: random.Random) -> None:
            raw = (
                mutated_archive(choose, folder / "good", path)
                if choose.random() < 0.5
                else mutated_bytes(choose, whole)
            )
            if raw is not None:
                path.write_bytes(raw)
            made, _ = import_sequence(pager, path, "default")
            pager.release(made)

        yield call


def mutated_archive(choose: random.Random, good: Path, bad: Path) -> None:
    """The same zip with one member changed, so that zip and its sums are whole and what is in it is not."""
    import zipfile

    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        names = source.namelist()
        victim = choose.choice([name for name in names if name.endswith(".json")] if choose.random() < 0.7 else names)
        for name in names:
            raw = source.read(name)
            if name == victim and name.endswith(".json") and choose.random() < 0.8:
                raw = json.dumps(mutated_value(choose, json.loads(raw), is_json=True)).encode()
            elif name == victim:
                raw = mutated_bytes(choose, raw)
            if name != victim or choose.random() < 0.95:
                target.writestr(name, raw)


ONE_OF_OURS = (KvTierError,)
TARGETS = [
    Target("frames", 1_300_000, (ProtocolError, EOFError), frames),
    Target("daemon_frames", 400_000, (ProtocolError,), daemon_frames),
    Target("daemon_requests", 5_000, (ProtocolError,), daemon_requests),
    Target("settings", 10_000, (ConfigError,), settings),
    Target("daemon_settings", 5_000, (ConfigError,), daemon_settings),
    Target("environment", 10_000, (ConfigError,), environment),
    Target("toml", 5_000, (ConfigError,), toml),
    Target("sizes", 150_000, (ConfigError,), sizes),
    Target("journal", 100_000, (ConfigError,), journal),
    Target("session_records", 60_000, (ConfigError,), session_records),
    Target("store_metadata", 3_000, (ConfigError,), store_metadata),
    Target("trailers", 100_000, (), trailers),
    Target("archives", 100, ONE_OF_OURS, archives),
]
