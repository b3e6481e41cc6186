"""Codecs are lossless for any bytes, say what is wrong with bytes that are not theirs, and mean the same to Zarr."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.tiers.errors import ConfigError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme import split
from kvtier.tiers.nvme.codecs import CODECS, codec_for

DTYPES = ("bfloat16", "float16", "float32")
ENCODING = [name for name in CODECS if name != "none"]


def layout(dtype: str = "bfloat16") -> KVLayout:
    return KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype=dtype)


def kinds_of_bytes(nbytes: int) -> dict[str, np.ndarray]:
    """Zeros, noise, bf16 gaussians with outlier channels, NaN payloads and infinities of every width."""
    random = np.random.default_rng(nbytes)
    gaussian = random.standard_normal(nbytes // 2 + 1).astype(np.float32)
    gaussian[::64] *= 40
    nans = random.integers(0x7F80, 0x8000, nbytes // 2 + 1, np.uint16) | random.integers(0, 2, nbytes // 2 + 1) << 15
    return {
        "zeros": np.zeros(nbytes, np.uint8),
        "noise": random.integers(0, 256, nbytes, np.uint8),
        "gaussian": (gaussian.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:nbytes],
        "nan": nans.astype(np.uint16).view(np.uint8)[:nbytes],
        "constant": np.full(nbytes, 0xFF, np.uint8),
    }


@pytest.mark.parametrize("nbytes", [1, 2, 3, 16, 4095, 32768, 1 << 20, (1 << 20) + 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ENCODING)
def test_what_was_encoded_comes_back_bit_for_bit(name, dtype, nbytes):
    codec = codec_for(name, layout(dtype))
    for kind, row in kinds_of_bytes(nbytes).items():
        encoded = codec.encode(row)
        assert len(encoded) <= nbytes + codec.overhead_bytes, kind
        back = np.full(nbytes, 7, np.uint8)
        codec.decode(np.frombuffer(encoded, np.uint8), back)
        assert np.array_equal(back, row), kind


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(min_size=0, max_size=3000), times=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_any_bytes_survive(raw, times, dtype):
    row = np.frombuffer(raw * times, np.uint8)
    for name in ENCODING:
        codec = codec_for(name, layout(dtype))
        if not len(row) and name != "split":  # Blosc has no frame of nothing
            continue
        encoded, back = codec.encode(row), np.empty_like(row)
        assert len(encoded) <= len(row) + codec.overhead_bytes
        codec.decode(np.frombuffer(encoded, np.uint8), back)
        assert np.array_equal(back, row)


@settings(max_examples=400, deadline=None)
@given(raw=st.binary(max_size=200), nbytes=st.sampled_from([0, 1, 64, 4096]), head=st.booleans())
def test_garbage_is_refused_with_a_reason(raw, nbytes, head):
    """Also where it starts like a frame."""
    for name in ENCODING:
        codec, row = codec_for(name, layout()), np.zeros(nbytes, np.uint8)
        start = codec.encode(np.zeros(max(nbytes, 1), np.uint8))[:16] if head else b""
        frame = np.frombuffer(start + raw, np.uint8)
        try:
            codec.decode(frame, row)
        except ValueError as error:
            assert str(error)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 2000), width=st.sampled_from([1, 2, 4, 8]))
def test_a_damaged_split_frame_is_refused_or_other_bytes_and_never_a_crash(at, bit, cut, width):
    row = kinds_of_bytes(20_001)["gaussian"]
    frame = bytearray(split.encode(row, width))
    frame[at % len(frame)] ^= 1 << bit
    frame = frame[: len(frame) - cut] if at % 3 == 0 else frame
    try:
        split.decode(np.frombuffer(bytes(frame), np.uint8), np.empty_like(row))
    except ValueError as error:
        assert str(error)


def test_lengths_in_a_frame_are_not_trusted():
    row = kinds_of_bytes(4096)["gaussian"]
    good = bytearray(split.encode(row, 2))
    for change, said in (
        ((8, (1 << 40).to_bytes(8, "little")), "where 4096 were expected"),
        ((16, (1 << 62).to_bytes(8, "little")), "plane 0 .* claims"),
        ((24, (3).to_bytes(8, "little")), "bytes behind its planes"),
        ((0, b"zzz"), "not a kvtier.split frame"),
        ((3, b"\x09"), "version 1"),
    ):
        frame = good.copy()
        frame[change[0] : change[0] + len(change[1])] = change[1]
        with pytest.raises(ValueError, match=said):
            split.decode(np.frombuffer(bytes(frame), np.uint8), np.empty_like(row))
    short = row[:2048]  # a whole zstd frame of fewer bytes than the plane has would leave its end as it was
    planes = [split.encode(short, 2)[32:], b""]
    head = bytes(good[:8]) + (4096).to_bytes(8, "little")
    frame = head + len(planes[0]).to_bytes(8, "little") + bytes(8) + planes[0]
    with pytest.raises(ValueError, match="holds other than 2048 bytes"):
        split.decode(np.frombuffer(frame, np.uint8), np.empty_like(row))


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("name", ENCODING)
def test_zarr_makes_and_reads_the_same_frames(tmp_path, name, dtype):
    import zarr

    codec = codec_for(name, layout("bfloat16" if dtype == "uint16" else dtype))
    array = zarr.create_array(
        str(tmp_path / "a"), shape=(4, 1024), chunks=(1, 1024), dtype=dtype, compressors=[codec.zarr_codec()]
    )
    nbytes = 1024 * array.dtype.itemsize
    for i, row in enumerate([row for kind, row in kinds_of_bytes(nbytes).items() if kind != "zeros"]):
        array[i] = row.view(array.dtype)
        file = tmp_path / "a" / "c" / str(i) / "0"
        back = np.empty(nbytes, np.uint8)
        codec.decode(np.frombuffer(file.read_bytes(), np.uint8), back)
        assert np.array_equal(back, row)
        file.write_bytes(codec.encode(row[::-1].copy()))
        assert zarr.open_array(str(tmp_path / "a"), mode="r")[i].tobytes() == row[::-1].tobytes()


def test_zarr_refuses_a_split_frame_that_claims_too_much(tmp_path):
    import zarr

    codec = codec_for("split", layout())
    array = zarr.create_array(
        str(tmp_path / "a"), shape=(1, 64), chunks=(1, 64), dtype="uint16", compressors=[codec.zarr_codec()]
    )
    array[0] = np.arange(64, dtype=np.uint16)
    (tmp_path / "a" / "c" / "0" / "0").write_bytes(split.encode(np.zeros(1 << 24, np.uint8), 2))
    with pytest.raises(ValueError, match="claims 16777216 bytes"):
        array[0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"codec='gzip' is unknown; choose none, lz4, zstd, split"):
        codec_for("gzip", layout())
    assert codec_for("none", layout()) is None
