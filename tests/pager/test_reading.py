"""K/V in and out without a model step: reading blocks in place, writing without context, sealed tails, persisting."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.pager.lease import Span
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import BlockMissError, TierFullError

from .harness import BLOCK, LAYOUT, WINDOWED, Rig, values

TOKENS = list(range(100, 142))  # 10 blocks and a tail of 2


def read(rig: Rig, seq: int, group: int = 0) -> dict[int, np.ndarray]:
    """Token values by position, of layer 0, from whatever tier; checks that layers, K and V say the same."""
    layout, end, found = rig.layouts[group], rig.pager.num_computed(seq), {}
    for piece in rig.pager.read_blocks(seq, group):
        rows = piece.rows[piece.row_ids].view(np.float32).reshape(len(piece.row_ids), layout.num_layers, 2, BLOCK, -1)
        for block, stored in zip(piece.logical.tolist(), rows, strict=True):
            num_tokens = min(BLOCK, end - block * BLOCK)
            tokens = stored[0, 0, :num_tokens, 0]
            for layer in range(layout.num_layers):
                assert (stored[layer, :, :num_tokens] == tokens[:, None] + layer).all()
            found |= {block * BLOCK + i: value for i, value in enumerate(tokens)}
    return found


def check_read(rig: Rig, seq: int, tokens: list[int], group: int = 0) -> None:
    window, end = rig.layouts[group].window, rig.pager.num_computed(seq)
    first = 0 if window is None else max(0, end - window + 1)
    found, wanted = read(rig, seq, group), values(tokens)
    assert [found[i] for i in range(first, end)] == wanted[first:end].tolist()


def write(rig: Rig, tokens: list[int], chunk: int = 8, **attach) -> int:
    """A sequence whose values are written from outside, as PrefixCache does."""
    seq = rig.pager.begin()
    rig.pager.attach(seq, tokens, with_tail=True, **attach)
    rig.pager.append(seq, tokens[rig.pager.num_computed(seq) :])
    while (start := rig.pager.num_computed(seq)) < len(tokens):
        end = min(start + chunk, len(tokens))
        with rig.pager.lease([Span(seq, start, end)], write_only=True) as lease:
            assert all(table.shape[1] <= chunk // BLOCK + 1 for table in lease.tables)
            for g, layout in enumerate(rig.layouts):
                for layer in range(layout.num_layers):
                    rig._write(lease, g, layer)
            lease.commit()
    rig.settle()
    return seq


@pytest.mark.parametrize("layouts", [[LAYOUT], [LAYOUT, WINDOWED]])
def test_blocks_are_read_where_they_are_from_every_tier(layouts, tmp_path, seed):
    rig = Rig(seed, pages=8, host=6, layouts=layouts, path=tmp_path / "s", backend=CpuBackend())
    seq = write(rig, TOKENS)
    rig.pager.persist([seq])
    other = write(rig, list(range(500, 530)))
    for tokens, one in ((TOKENS, seq), (list(range(500, 530)), other)):
        for group in range(len(layouts)):
            check_read(rig, one, tokens, group)
    rig.settle()  # what reading displaced is written
    rig.pager.check_integrity()
    held = rig.pager._core.groups
    assert not any(g.pages.pins.any() or g.host.holds.any() or g.awaited for g in held)
    rig.close()


def test_a_tail_is_found_by_its_content_and_lengthened_by_a_copy():
    rig = Rig(pages=40)
    seq = write(rig, TOKENS)
    rig.pager.seal(seq)
    rig.pager.finish(seq)
    assert rig.pager.match(TOKENS).tokens == 40
    longer = rig.pager.begin()
    match = rig.pager.attach(longer, [*TOKENS, 1, 2, 3], with_tail=True)
    assert match.tokens == match.device_tokens == 42
    check_read(rig, longer, TOKENS)
    rig.pager.finish(longer)
    both = [write(rig, [*TOKENS, 7, 8, 9]), write(rig, [*TOKENS, 7, 1, 1])]
    for one, end in zip(both, ([7, 8, 9], [7, 1, 1]), strict=True):
        check_read(rig, one, [*TOKENS, *end])
    assert rig.pager.counters.get("copy_on_write_blocks") == 2
    rig.pager.check_integrity()
    rig.close()


@pytest.mark.parametrize("layouts", [[LAYOUT], [LAYOUT, WINDOWED]])
def test_what_was_persisted_is_there_after_a_restart(layouts, tmp_path):
    rig = Rig(pages=40, layouts=layouts, path=tmp_path / "s", backend=CpuBackend())
    seq, forgotten = write(rig, TOKENS), write(rig, [1, 2, 3, 4, 5, 6, 7, 8])
    rig.pager.persist([seq])
    for one in (seq, forgotten):
        rig.pager.finish(one)
    rig.pager.check_integrity()
    rig.close()
    rig = Rig(pages=40, layouts=layouts, path=tmp_path / "s", backend=CpuBackend())
    assert rig.pager.match([1, 2, 3, 4, 5, 6, 7, 8]).tokens == 0
    for end in (42, 41, 40):  # the whole, and every point that lies in the last block
        seq = rig.pager.begin()
        rig.pager.attach(seq, TOKENS, with_tail=True)
        assert rig.pager.truncate(seq, end) == end
        for group in range(len(layouts)):
            check_read(rig, seq, TOKENS, group)
        rig.pager.finish(seq)
    rig.close()


def test_readers_share_a_host_tier_of_two_slots(tmp_path):
    rig = Rig(pages=4, host=2, path=tmp_path / "s", backend=CpuBackend())
    seqs = []
    for start in range(3):
        tokens = list(range(start * 50, start * 50 + 40))
        seqs.append((write(rig, tokens, chunk=BLOCK), tokens))
        rig.pager.persist([seqs[-1][0]])
    wrong: list[BaseException] = []

    def reader(seq: int, tokens: list[int]) -> None:
        try:
            for _ in range(5):
                check_read(rig, seq, tokens)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=reader, args=one) for one in seqs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    rig.pager.check_integrity()
    rig.close()


def test_a_reader_that_stops_early_holds_nothing(tmp_path):
    rig = Rig(pages=40)
    seq = write(rig, TOKENS)
    pieces = rig.pager.read_blocks(seq, 0)
    next(pieces)
    assert rig.pager._core.groups[0].pages.pins.any()
    pieces.close()
    assert not rig.pager._core.groups[0].pages.pins.any()
    rig.pager.finish(seq)
    rig.close()


def test_what_a_reader_holds_is_neither_moved_nor_overwritten(tmp_path):
    rig = Rig(pages=6, host=4, path=tmp_path / "s", backend=CpuBackend())
    tokens = list(range(12))
    seq = write(rig, tokens, chunk=BLOCK)
    rig.pager.persist([seq])
    tiers = set()
    while tiers != {"device", "host"}:
        pieces = rig.pager.read_blocks(seq, 0)
        piece = next(pieces)
        before = piece.rows[piece.row_ids].copy()
        for start in (1000, 2000, 3000):  # as much as both tiers hold, three times
            other = write(rig, list(range(start, start + 24)), chunk=BLOCK)
            rig.pager.persist([other])
            rig.pager.finish(other)
        assert (piece.rows[piece.row_ids] == before).all()
        pieces.close()
        tiers.add(piece.tier)
        if tiers == {"device"}:
            rig.pager.demote(seq)
            rig.settle()
    check_read(rig, seq, tokens)
    rig.pager.check_integrity()
    rig.close()


def test_a_lost_block_ends_the_reading_with_what_is_left(tmp_path, monkeypatch):
    from kvtier.tiers.nvme.store import Geometry

    rig = Rig(pages=4, host=2, path=tmp_path / "s", backend=CpuBackend())
    seq = write(rig, TOKENS, chunk=BLOCK)
    rig.pager.persist([seq])
    monkeypatch.setattr(Geometry, "read_tail", lambda self, tail: None)
    with pytest.raises(BlockMissError) as miss:
        read(rig, seq)
    assert rig.pager.num_computed(seq) == miss.value.num_valid < 42
    assert miss.value.num_valid % BLOCK == 0
    rig.pager.check_integrity()
    rig.close()


def test_what_cannot_be_persisted_says_why(tmp_path):
    rig = Rig(pages=16, path=tmp_path / "s", nvme_bytes=64 << 10, backend=CpuBackend())
    room = rig.pager._core.groups[0].nvme_room()
    tokens = list(range((room + 2) * BLOCK))
    seq = write(rig, tokens)
    with pytest.raises(TierFullError, match="raise nvme_bytes"):
        rig.pager.persist([seq], timeout_s=1.0)
    check_read(rig, seq, tokens)
    rig.pager.finish(seq)
    rig.close()
