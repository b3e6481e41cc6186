"""Encrypted stores: what is written comes back with the secret and not without it, the disk shows nothing of it, and bytes
that somebody changed, swapped or put back are a miss, also where that somebody mends every checksum."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import crc32c
import numpy as np
import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tiers.nvme import maintenance, sealing
from kvtier.tiers.nvme.codecs import ENCRYPTED, check_codecs, overhead_of
from kvtier.tiers.nvme.layout import CRC_BYTES
from kvtier.tiers.nvme.sealing import HEADER, BlockSealer, Header, RecordSealer
from kvtier.tiers.nvme.store import NvmeTier
from kvtier.tiers.owners import owner_tag

from .test_nvme import stamps
from .test_nvme_codecs import IDENTITY, NUM_SLOTS, blocks, load, load_layer, segments

ALICE, BOB = owner_tag("alice"), owner_tag("bob")
SECRETS = {ALICE: b"a" * 32, BOB: b"b" * 32}


def open_tier(path, backend, codec="aes", secrets=SECRETS, **options) -> NvmeTier:
    names = None if codec is None else [codec] * len(NUM_SLOTS)
    return NvmeTier.open(path, IDENTITY, num_slots=NUM_SLOTS, backend=backend, codecs=names, secrets=secrets, **options)


def write(tier, slots, rows, seed=0, owner=ALICE, group=0):
    marks = stamps(len(slots), seed, tokens=64)
    marks["owner"] = owner
    ticket = tier.write(group, slots, rows, np.arange(len(slots)), marks)
    assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.all()


def store(tier, n, seed=0, owner=ALICE, group=0):
    rows, slots = blocks(IDENTITY.layouts[group], n, seed), tier.allocate(group, n)
    write(tier, slots, rows, seed, owner, group)
    return slots, rows


def place(path, tier, slot) -> tuple:
    """The file of a slot of group 0, where its chunk starts, and its length without crc."""
    number, offset = tier.geometry(0).place(int(slot))
    file = next(f for f in segments(path) if f.name.split(".")[1] == str(number))
    return file, offset, int(tier.stamps(0, np.array([slot]))["stored_bytes"][0]) - CRC_BYTES


def put_chunk(path, tier, slot, chunk: bytes) -> None:
    """What somebody who may write to the disk can do: other bytes in a slot, with crc and seal made right again."""
    file, offset, size = place(path, tier, slot)
    assert len(chunk) == size
    raw, geometry = bytearray(file.read_bytes()), tier.geometry(0)
    trailer = geometry.read_tail(bytes(raw[offset + size : offset + size + geometry.proof_bytes]))
    assert trailer is not None
    proof = geometry.proof(replace(trailer, crc=crc32c.crc32c(chunk)))
    raw[offset : offset + size + len(proof)] = chunk + proof
    file.write_bytes(raw)


def chunk_of(path, tier, slot) -> bytes:
    file, offset, size = place(path, tier, slot)
    return file.read_bytes()[offset : offset + size]


# ---------------------------------------------------------------------- what it is for
@pytest.mark.parametrize("codec", ENCRYPTED)
def test_comes_back_with_the_secret_also_after_a_restart(tmp_path, backend, codec):
    tier = open_tier(tmp_path / "s", backend, codec)
    written = [store(tier, 9, group, (ALICE, BOB)[group % 2], group) for group in range(4)]
    for _ in range(2):
        for group, (slots, rows) in enumerate(written):
            ok, seen = load(tier, slots, group)
            assert ok.all() and np.array_equal(seen, rows)
            size = IDENTITY.layouts[group].layer_bytes
            ok, seen = load_layer(tier, slots, 1, group)
            assert ok.all() and np.array_equal(seen, rows[:, size : 2 * size])
        tier.close()
        tier = open_tier(tmp_path / "s", backend, None)
        assert tier.codecs == [codec] * 4 and tier.is_encrypted
    tier.close()


def test_the_disk_shows_neither_bytes_nor_sums_of_them(tmp_path, backend):
    """One block, written twice: nothing of the two writings is alike but its name, no run of its bytes is anywhere."""
    tier = open_tier(tmp_path / "s", backend)
    row = np.frombuffer(b"a secret sentence of the prompt!" * (IDENTITY.layouts[0].block_bytes // 32), np.uint8)
    rows, slots = np.stack([row, row]), tier.allocate(0, 2)
    write(tier, slots, rows)
    sums = tier.stamps(0, slots)["checksum"]
    assert sums[0] != sums[1]
    first, second = (np.frombuffer(chunk_of(tmp_path / "s", tier, s)[HEADER.size :], np.uint8) for s in slots)
    assert (first == second).mean() < 0.01
    tier.close()
    for file in (f for f in (tmp_path / "s").rglob("*") if f.is_file()):
        assert b"secret sentence" not in file.read_bytes(), file


@pytest.mark.parametrize("codec", ["aes", "zstd+aes"])
def test_another_secret_or_none_is_a_miss_said_once_and_no_byte_of_it_is_served(tmp_path, backend, codec, caplog):
    tier = open_tier(tmp_path / "s", backend, codec)
    slots, _ = store(tier, 4)
    bobs, rows = store(tier, 2, 7, BOB)
    tier.close()
    for secrets, reason in (({**SECRETS, ALICE: b"x" * 32}, "another_secret"), ({BOB: SECRETS[BOB]}, "no_secret")):
        caplog.clear()
        tier = open_tier(tmp_path / "s", backend, None, secrets)
        ok, seen = load(tier, slots)
        assert not ok.any() and not seen.any()
        ok, seen = load(tier, bobs)  # the others' blocks are as they were
        assert ok.all() and np.array_equal(seen, rows)
        said = [r.getMessage() for r in caplog.records if "block_does_not_open" in r.getMessage()]
        assert len(said) == 1 and reason in said[0] and f"{ALICE:08x}" in said[0]
        tier.close()
    tier = open_tier(tmp_path / "s", backend, None)
    assert load(tier, slots)[0].all()
    tier.close()


# ---------------------------------------------------------------------- somebody who may write to the disk
@pytest.mark.parametrize("codec", ["aes", "lz4+aes"])
def test_every_changed_bit_is_a_miss_though_crc_and_seal_are_made_right(tmp_path, backend, codec):
    tier = open_tier(tmp_path / "s", backend, codec)
    slots, rows = store(tier, 1)
    chunk, random = chunk_of(tmp_path / "s", tier, slots[0]), np.random.default_rng(0)
    header = np.arange(HEADER.size * 8)
    places = np.concatenate([header, random.integers(0, len(chunk) * 8, 100), len(chunk) * 8 - 1 - np.arange(16)])
    for place_of_bit in places.tolist():
        changed = bytearray(chunk)
        changed[place_of_bit // 8] ^= 1 << place_of_bit % 8
        put_chunk(tmp_path / "s", tier, slots[0], bytes(changed))
        ok, seen = load(tier, slots)
        assert not ok.any() and not seen.any(), place_of_bit
        assert not load_layer(tier, slots, 2)[0].any()
    put_chunk(tmp_path / "s", tier, slots[0], chunk)
    ok, seen = load(tier, slots)
    assert ok.all() and np.array_equal(seen, rows)
    tier.close()


def test_a_block_in_another_ones_slot_does_not_open(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    mine, _ = store(tier, 2)
    bobs, _ = store(tier, 1, 5, BOB)
    chunks = {slot: chunk_of(tmp_path / "s", tier, slot) for slot in [*mine.tolist(), *bobs.tolist()]}
    for target, source in ((mine[0], mine[1]), (mine[0], bobs[0]), (bobs[0], mine[0])):
        put_chunk(tmp_path / "s", tier, target, chunks[int(source)])
        assert not load(tier, np.array([target]))[0].any()
        named = Header.of(chunks[int(target)])  # and named as the one that is listed there
        put_chunk(tmp_path / "s", tier, target, named.pack() + chunks[int(source)][HEADER.size :])
        assert not load(tier, np.array([target]))[0].any()
        put_chunk(tmp_path / "s", tier, target, chunks[int(target)])
        assert load(tier, np.array([target]))[0].all()
    tier.close()


def test_an_older_block_of_the_same_slot_and_key_does_not_open(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, _ = store(tier, 1)
    older = chunk_of(tmp_path / "s", tier, slots[0])
    rows = blocks(IDENTITY.layouts[0], 1, 99)
    write(tier, slots, rows)  # the same key again, other content: as a private tail that grew
    newer = chunk_of(tmp_path / "s", tier, slots[0])
    assert Header.of(older).key == Header.of(newer).key
    put_chunk(tmp_path / "s", tier, slots[0], older)
    assert not load(tier, slots)[0].any()
    put_chunk(tmp_path / "s", tier, slots[0], Header.of(newer).pack() + older[HEADER.size :])
    assert not load(tier, slots)[0].any()
    put_chunk(tmp_path / "s", tier, slots[0], newer)
    assert np.array_equal(load(tier, slots)[1], rows)
    tier.close()


def test_without_the_check_of_the_header_the_older_block_would_be_served(tmp_path, backend, monkeypatch):
    """Shows that generation and key in the header are what stops a replay: the tag alone is right for an old block."""
    tier = open_tier(tmp_path / "s", backend)
    slots, rows = store(tier, 1)
    older, stamp = chunk_of(tmp_path / "s", tier, slots[0]), tier.stamps(0, slots)
    write(tier, slots, blocks(IDENTITY.layouts[0], 1, 99))
    put_chunk(tmp_path / "s", tier, slots[0], older)
    real = Header.of

    def blind(sealed):
        return real(sealed)._replace(generation=int(tier.stamps(0, slots)["generation"][0]))

    monkeypatch.setattr(sealing.Header, "of", staticmethod(blind))
    assert not load(tier, slots)[0].any()  # the generation is authenticated too: two guards, one for each way around
    monkeypatch.setattr(sealing.Header, "pack", lambda self: older[: HEADER.size])
    ok, seen = load(tier, slots)
    assert ok.all() and np.array_equal(seen, rows) and int(stamp["generation"][0]) == real(older).generation
    tier.close()


# ---------------------------------------------------------------------- nonces
def test_no_key_and_nonce_come_twice_over_threads_processes_forks_and_restarts():
    row, seen = np.zeros(64, np.uint8), set()

    def note(sealer: BlockSealer, times: int) -> None:
        for _ in range(times):
            header = Header.of(sealer.seal(row, ALICE, b"k" * 32, 1))
            assert (header.era, header.nonce) not in seen
            seen.add((header.era, header.nonce))

    sealers = [BlockSealer(SECRETS, "f"), BlockSealer(SECRETS, "f")]
    for _ in range(3):
        for sealer in sealers:
            note(sealer, 50)
    assert len({era for era, _ in seen}) == 2
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write_end, Header.of(sealers[0].seal(row, ALICE, b"k" * 32, 1)).era)
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 16) not in {era for era, _ in seen}
    os.close(read_end)
    os.close(write_end)


def test_an_era_ends_before_its_key_has_sealed_too_much(monkeypatch):
    monkeypatch.setattr(sealing, "ERA_BYTES", 1000)
    sealer, row = BlockSealer(SECRETS, "f"), np.zeros(300, np.uint8)
    eras = [Header.of(sealer.seal(row, ALICE, b"k" * 32, i)).era for i in range(7)]
    assert [eras.count(era) for era in dict.fromkeys(eras)] == [3, 3, 1]


def test_a_key_is_of_one_namespace_layout_and_kind():
    sealed = BlockSealer(SECRETS, "f").seal(np.zeros(64, np.uint8), ALICE, b"k" * 32, 1)
    plain = np.ones(64, np.uint8)
    assert BlockSealer(SECRETS, "f").open(sealed, plain) and not plain.any()
    assert not BlockSealer(SECRETS, "other layout").open(sealed, plain)
    assert not BlockSealer({ALICE: SECRETS[BOB]}, "f").open(sealed, plain)
    assert not BlockSealer(SECRETS, "f").open(sealed, np.empty(63, np.uint8))
    assert not BlockSealer(SECRETS, "f").open(sealed[:10], plain)


# ---------------------------------------------------------------------- records, other readers, maintenance
def test_a_record_opens_with_its_secret_under_its_name_only():
    sealer = RecordSealer(SECRETS)
    record = {"namespace": "alice--salt", "token_ids": b"tokens of the prompt", "n": 3}
    name, sealed = sealer.wrap("my chat", record)
    assert sealer.unwrap(name, sealed) == ("my chat", record) and name == sealer.name("my chat", "alice")
    assert b"tokens" not in sealed["sealed"] and b"my chat" not in sealed["sealed"] and "chat" not in name
    assert sealer.wrap("my chat", record)[1]["sealed"] != sealed["sealed"]
    assert sealer.name("my chat", "bob") != name
    for changed in (
        {**sealed, "owner": BOB},
        {**sealed, "sealed": sealed["sealed"][:-1] + bytes([sealed["sealed"][-1] ^ 1])},
        {**sealed, "era": b"e" * 16},
        {**sealed, "era": 7},
        {"sealed": b""},
    ):
        assert sealer.unwrap(name, changed) is None
    assert sealer.unwrap("another name", sealed) is None
    assert RecordSealer({ALICE: b"x" * 32}).unwrap(name, sealed) is None
    with pytest.raises(ConfigError, match="has no secret"):
        RecordSealer({}).wrap("chat", record)


_READER = """
import sys, numpy as np, zarr
array = zarr.open_group(sys.argv[1], mode="r")["g0"]
np.save(sys.argv[2], np.asarray(array[0]).reshape(-1).view(np.uint8))
"""


@pytest.mark.parametrize("codec", ["aes", "zstd+aes"])
def test_stock_zarr_reads_with_the_secret_and_refuses_in_words_without(tmp_path, backend, codec):
    tier = open_tier(tmp_path / "s", backend, codec)
    _, rows = store(tier, 1)
    tier.close()

    def read(**env):
        command = [sys.executable, "-c", _READER, tmp_path / "s" / "blocks.zarr", tmp_path / "seen.npy"]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, **env})

    assert read(KVTIER_NAMESPACE_SECRETS=f"bob=00,alice={SECRETS[ALICE].hex()}").returncode == 0
    assert np.array_equal(np.load(tmp_path / "seen.npy"), rows[0])
    for env, said in (
        ({}, f"encrypted for the namespace with tag {ALICE:#010x}; set KVTIER_NAMESPACE_SECRETS"),
        ({"KVTIER_NAMESPACE_SECRETS": f"alice={'00' * 32}"}, "another secret than it was sealed with"),
        ({"KVTIER_NAMESPACE_SECRETS": "alice=zz"}, "is to be name=hex"),
    ):
        done = read(**env)
        assert done.returncode == 1 and said in done.stderr


def test_check_and_export_need_the_secrets_and_harm_nothing_without(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    _, rows = store(tier, 5)
    tier.put_session(*RecordSealer(SECRETS).wrap("chat", {"namespace": "alice", "token_ids": b"1234"}))
    tier.close()

    def quiet(done, total):
        return None

    for secrets in ({}, {BOB: SECRETS[BOB]}):
        with pytest.raises(ConfigError, match="secrets of 1 namespaces are not given"):
            maintenance.check(tmp_path / "s", quiet, repair=True, secrets=secrets)
        with pytest.raises(ConfigError, match="secrets of 1 namespaces"):
            maintenance.copy(tmp_path / "s", tmp_path / "none", quiet, secrets=secrets)
    assert maintenance.check(tmp_path / "s", quiet, secrets=SECRETS).to_dict()["bad_blocks"] == 0
    maintenance.copy(tmp_path / "s", tmp_path / "open", quiet, codec="none", secrets=SECRETS)
    maintenance.copy(tmp_path / "open", tmp_path / "closed", quiet, codec="lz4+aes", secrets=SECRETS)
    for path, is_closed in ((tmp_path / "open", False), (tmp_path / "closed", True)):
        tier = open_tier(path, backend, None)
        ok, seen = load(tier, tier.recovered()[0][0])
        assert ok.all() and np.array_equal(seen, rows)
        (name, record), *others = tier.sessions().items()
        assert not others and (name == "chat") != is_closed and sealing.is_sealed(record) == is_closed
        tier.close()


def test_all_layer_groups_are_encrypted_or_none(tmp_path):
    with pytest.raises(ConfigError, match="encrypt all layer groups of a store, or none"):
        check_codecs(["aes", "none", "none", "none"], IDENTITY.layouts)
    assert overhead_of("none", IDENTITY.layouts[0]) is None
    assert overhead_of("aes", IDENTITY.layouts[0]) == sealing.OVERHEAD_BYTES
