"""One session as one file that travels: a Zarr v3 hierarchy in a zip, with its token ids and its K/V.

Any Zarr client opens it. It fits the model that made it, in any store, namespace and block size. K/V of windowed layers
are only there for the window, which is not enough to continue from, and packed K/V are no plain numbers: such a session
travels as token ids and is computed again at its next turn.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pager.pager import Pager
from ..tiers.errors import ConfigError, KvTierError, StoreMismatchError, TierFullError
from ..tiers.layout import KVLayout
from .kv_copy import GroupKV, KVCopier

FORMAT = 1
CHUNK_TOKENS, TOKENS_PER_CHUNK = 1024, 1 << 16
MAX_VALUES = 1 << 36  # of one array
MAX_TOKENS = 1 << 24
READ_TIMEOUT_S = 120.0
_RAW = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def export_sequence(pager: Pager, seq: int, path: Path, about: dict[str, Any]) -> None:
    """Write a sequence and JSON values about it to a new file. The sequence must not be leased meanwhile.

    Raises: ConfigError when the file exists or cannot be written; BlockMissError when a block is lost.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import ZipStore

    if pager.is_branched(seq):
        raise ConfigError(
            "this session holds K/V of attention='window' or 'select', which are approximate; roll it back to before that "
            "to export it"
        )
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another name, or remove it")
    computed = pager.num_computed(seq)
    groups = list[GroupKV]()
    if _travels(pager.layouts):
        groups = KVCopier(pager).read(seq, torch.device("cpu"), in_one=True, timeout_s=READ_TIMEOUT_S)
    part = path.with_name(path.name + ".part")
    try:
        with ZipStore(part, mode="w") as store:
            said = {
                "kvtier_session": FORMAT,
                "computed_tokens": computed,
                "model": pager.model_fingerprint,
                "layouts": [_shape_of(layout) for layout in pager.layouts],
                **about,
            }
            root = zarr.create_group(store, zarr_format=3, attributes=said)
            arrays = {"token_ids": np.asarray(pager.token_ids(seq), np.uint32)}
            for index, group in enumerate(groups):
                arrays |= {f"g{index}_{name}": _raw(kv) for name, kv in zip("kv", _stacked(group), strict=True)}
            for name, values in arrays.items():
                chunks = (
                    (*values.shape[:-2], CHUNK_TOKENS, values.shape[-1]) if values.ndim > 2 else (TOKENS_PER_CHUNK,)
                )
                codecs: Any = dict(serializer=BytesCodec(), compressors=[Crc32cCodec()], filters=None)
                made = root.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, **codecs)
                made[...] = values
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def import_sequence(pager: Pager, path: Path, namespace: str) -> tuple[int, dict[str, Any]]:
    """A new sequence with what the file holds, and the values about it.

    Raises: ConfigError for a file that is no archive or is damaged; StoreMismatchError for another model's;
    TierFullError when there is no room.
    """
    import zarr
    from zarr.storage import ZipStore

    if not zipfile.is_zipfile(path):
        raise ConfigError(f"{path} is not a whole session archive: it is no zip file")
    try:
        with ZipStore(path, mode="r") as store:
            root = zarr.open_group(store, mode="r")
            about: dict[str, Any] = dict(root.attrs)
            _check(pager, path, about)
            tokens = _whole(root, "token_ids", 1).tolist()
            computed, groups = int(about["computed_tokens"]), list[GroupKV]()
            if not 0 <= computed <= len(tokens):
                raise ValueError(f"{computed} computed tokens of {len(tokens)}")
            if computed > pager.capacity_tokens():
                raise TierFullError(
                    f"{path} holds {computed} tokens, this pager {pager.capacity_tokens()}", retry_after_s=60.0
                )
            if _travels(pager.layouts):
                groups = [_group(root, index, layout, computed) for index, layout in enumerate(pager.layouts)]
    except KvTierError:
        raise
    except Exception as error:  # zarr and zipfile raise what their own parts do for files that are made to hurt
        raise ConfigError(f"{path} is not a whole session archive: {error!r:.200}") from error
    return _place(pager, namespace, tokens, computed, groups), about


def _place(pager: Pager, namespace: str, tokens: list[int], computed: int, groups: list[GroupKV]) -> int:
    seq = pager.begin(namespace)
    try:
        if groups:
            pager.attach(seq, tokens[:computed], count=False)
            pager.append(seq, tokens[pager.num_computed(seq) : computed])
            KVCopier(pager).write(seq, groups, require=lambda start: None, timeout_s=READ_TIMEOUT_S)
            pager.append(seq, tokens[computed:])
        else:
            pager.append(seq, tokens)
    except BaseException:
        pager.finish(seq)
        raise
    return seq


def _check(pager: Pager, path: Path, about: dict[str, Any]) -> None:
    if about.get("kvtier_session") != FORMAT:
        raise ConfigError(f"{path}: format {about.get('kvtier_session')!r}; this version reads {FORMAT}")
    if about["model"] != pager.model_fingerprint or about["layouts"] != [_shape_of(x) for x in pager.layouts]:
        raise StoreMismatchError(f"{path} was made with another model, or with other settings of it")


def _travels(layouts: Sequence[KVLayout]) -> bool:
    return all(layout.window is None for layout in layouts)


def _shape_of(layout: KVLayout) -> dict[str, Any]:
    """What must agree; the block size need not."""
    return {name: value for name, value in layout.to_dict().items() if name != "block_size"}


def _stacked(group: GroupKV) -> tuple[torch.Tensor, torch.Tensor]:
    """K [layers, kv_heads, tokens, head_dim] and V [layers, kv_heads, tokens, value_dim]."""
    return torch.stack([k for k, _ in group.layers]), torch.stack([v for _, v in group.layers])


def _raw(values: torch.Tensor) -> np.ndarray[Any, Any]:
    return values.contiguous().view(_RAW[values.dtype]).numpy()


def _group(root: Any, index: int, layout: KVLayout, computed: int) -> GroupKV:
    dtype, parts = getattr(torch, layout.dtype), []
    for name, width in (("k", layout.head_dim), ("v", layout.v_dim)):
        wanted = (layout.num_layers, layout.num_kv_heads, computed, width)
        parts.append(torch.from_numpy(_whole(root, f"g{index}_{name}", 4, wanted)).view(dtype))
    k, v = parts
    return GroupKV(list(zip(k, v, strict=True)), computed)


def _whole(root: Any, name: str, dims: int, wanted: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
    """An array as we write them, read only when its metadata ask for no more memory than that. Raises ValueError."""
    array = root[name]
    chunks = (*array.shape[:-2], CHUNK_TOKENS, array.shape[-1]) if dims > 2 else (TOKENS_PER_CHUNK,)
    is_ours = array.ndim == dims and array.chunks == chunks and array.size <= (MAX_VALUES if dims > 2 else MAX_TOKENS)
    if not is_ours or (wanted is not None and array.shape != wanted):
        raise ValueError(f"{name} of shape {array.shape} in chunks of {array.chunks} is not what this model takes")
    return np.asarray(array[...])
