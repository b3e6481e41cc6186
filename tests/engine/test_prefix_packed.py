"""A prefix cache whose blocks are packed: what it loads is what the format kept of what was stored, and no worse."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvtier import KVLayout
from kvtier.kernels import PageFormat, dequantize_blocks, quantize_blocks
from kvtier.tiers.errors import ConfigError, StoreMismatchError, UnpackableError

from .prefix_rig import DOCUMENT, check, run, stock_past
from .test_families import tiny

BLOCK = 16
WIDE = KVLayout(2, 2, 32, BLOCK, "bfloat16", value_dim=64)
NARROW = KVLayout(1, 2, 32, BLOCK, "bfloat16", window=24, name="window24")
BY_LAYOUT = dict(layout=[WIDE, NARROW], model_fingerprint="mine", device="int8", block_size=None)


def rounded(x: torch.Tensor, other: torch.Tensor, name: str, is_value: bool, first: int = 0) -> torch.Tensor:
    """K or V [heads, tokens, dim] that begin at token `first`, whole blocks as the format gives them back."""
    heads, tokens, _ = x.shape
    low, high = -(-first // BLOCK) * BLOCK - first, (first + tokens) // BLOCK * BLOCK - first
    if high <= low:
        return x
    k, v = (y[:, low:high].unflatten(1, (-1, BLOCK)).transpose(0, 1) for y in ((other, x) if is_value else (x, other)))
    fmt = PageFormat(name, heads, BLOCK, k.shape[-1], v.shape[-1])
    pages = torch.zeros(len(k), fmt.layer_bytes, dtype=torch.uint8)
    quantize_blocks(k, v, range(len(k)), pages, range(len(k)), fmt)
    back = [torch.empty(y.shape, dtype=y.dtype) for y in (k, v)]
    dequantize_blocks(pages, range(len(k)), *back, range(len(k)), fmt)
    result = x.clone()
    result[:, low:high] = back[is_value].transpose(0, 1).flatten(1, 2)
    return result


def made_up(tokens: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A past for both layouts; the windowed one from its first token on."""
    torch.manual_seed(seed)
    shapes = [(layout.num_layers, 2, tokens) for layout in (WIDE, NARROW)]
    return [
        (torch.randn(*shape, layout.head_dim).bfloat16(), torch.randn(*shape, layout.v_dim).bfloat16())
        for shape, layout in zip(shapes, (WIDE, NARROW), strict=True)
    ]


@pytest.mark.parametrize("device", ["int8", "int4/32"])
def test_what_is_loaded_is_what_the_format_kept_of_what_was_stored(device, caches):
    model, past = tiny("llama"), stock_past(tiny("llama"))
    ids = [*range(3, 3 + 2 * BLOCK), *DOCUMENT]
    run(model, past, ids)
    with caches(model, device=device) as cache:
        cache.store(ids, past, durable=True)
        check(cache)
    with caches(model, device=device) as cache:  # from disk
        for _ in "ab":
            n, loaded = cache.load([*ids, 5])
            assert n == len(ids)
            for ours, theirs in zip(loaded.layers, past.layers, strict=True):
                k, v = theirs.keys[0], theirs.values[0]
                assert torch.equal(ours.keys[0], rounded(k, v, device.split("/")[0], False))
                assert torch.equal(ours.values[0], rounded(v, k, device.split("/")[0], True))
            assert not torch.equal(loaded.layers[0].keys, past.layers[0].keys)
        tensors = cache.load([*ids, 5], as_tensors=True)[1]
        assert torch.equal(tensors[0, 0], loaded.layers[0].keys[0])
    with pytest.raises(StoreMismatchError):
        caches(model)


def test_windows_and_two_widths_from_any_length_to_any_other(caches):
    """Stored in pieces that end inside blocks: what is not whole yet is exact, and a block is packed once, when it is."""
    whole, ends = made_up(7 * BLOCK + 5), [5, BLOCK, BLOCK + 9, 3 * BLOCK - 1, 3 * BLOCK + 2, 7 * BLOCK + 5]
    with caches(**BY_LAYOUT) as cache:
        ids = list(range(ends[-1]))
        for before, end in itertools.pairwise([0, *ends]):
            assert cache.store(ids[:end], [(k[:, :, :end], v[:, :, :end]) for k, v in whole]) == end - before
            n, loaded = cache.load(ids[:end], leave_last=False)
            assert n == end
            for layout, (k, v), (mine_k, mine_v) in zip((WIDE, NARROW), whole, _pairs(loaded), strict=True):
                first = max(0, end - layout.window + 1) if layout.window else 0
                assert mine_k.shape[2] == end - first
                for layer in range(layout.num_layers):
                    wanted = rounded(k[layer, :, :end], v[layer, :, :end], "int8", False)[:, first:]
                    assert torch.equal(mine_k[layer], wanted)
                    wanted = rounded(v[layer, :, :end], k[layer, :, :end], "int8", True)[:, first:]
                    assert torch.equal(mine_v[layer], wanted)
        check(cache)


def _pairs(loaded):
    return [one if isinstance(one, tuple) else (one[:, 0], one[:, 1]) for one in loaded]


def test_a_prompt_that_ends_with_a_block_is_loaded_up_to_the_block_before(caches):
    """One token is left to the model, and a packed block cannot be cut."""
    ids, whole = list(range(3 * BLOCK)), made_up(3 * BLOCK)
    with caches(**BY_LAYOUT) as cache:
        cache.store(ids, whole)
        assert cache.load(ids)[0] == 2 * BLOCK
        assert cache.load(ids, leave_last=False)[0] == 3 * BLOCK


def test_documents_are_joined_from_packed_blocks(caches):
    model, chunks = tiny("llama"), [DOCUMENT[:40], DOCUMENT[40:75]]
    with caches(model) as cache:
        exact = cache.chunk_error(chunks, [7, 8]).key_error
    caches.path = caches.path.with_name("packed")
    with caches(model, device="int8") as cache:
        n, past = cache.load_chunks(chunks)
        assert n == 75 and past.get_seq_length() == 75
        assert abs(cache.chunk_error(chunks, [7, 8]).key_error - exact) < 0.01


def test_values_that_the_format_cannot_hold_are_not_stored(caches):
    ids, whole = list(range(3 * BLOCK + 4)), made_up(3 * BLOCK + 4)
    whole[0][0][1, 0, BLOCK + 3, 7] = float("inf")
    with caches(**BY_LAYOUT) as cache:
        with pytest.raises(UnpackableError, match="device='int8': layer 1 of its group"):
            cache.store(ids, whole)
        assert cache.match(ids) == 0
        check(cache)
        assert cache.store(ids[:BLOCK], [(k[:, :, :BLOCK], v[:, :, :BLOCK]) for k, v in whole]) == BLOCK


@pytest.mark.parametrize(
    ("change", "says"), [(dict(device="int9"), "'int9' is unknown"), (dict(host="int4"), "come back as another")]
)
def test_what_cannot_be_is_refused(change, says, caches):
    with pytest.raises(ConfigError, match=says):
        caches(**(BY_LAYOUT | change))
