"""One session as one file that travels: a Zarr v3 hierarchy in a zip, with its token ids and its K/V.

Any Zarr client opens it. It fits the model that made it, in any store, namespace and block size. K/V of windowed layers
are only there for the window, which is not enough to continue from: such a session travels as token ids and is computed
again at its next turn.
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
from ..tiers.errors import ConfigError, StoreMismatchError
from ..tiers.layout import KVLayout
from .kv_copy import GroupKV, KVCopier

FORMAT = 1
CHUNK_TOKENS = 1024
READ_TIMEOUT_S = 120.0
_RAW = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def export_sequence(pager: Pager, seq: int, path: Path, about: dict[str, Any]) -> None:
    """Write a sequence and JSON values about it to a new file. The sequence must not be leased meanwhile.

    Raises: ConfigError when the file exists or cannot be written; BlockMissError when a block is lost.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import ZipStore

    if path.exists():
        raise ConfigError(f"{path} exists already; choose another name, or remove it")
    computed = pager.num_computed(seq)
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
            if _travels(pager.layouts):
                for index, group in enumerate(groups):
                    arrays |= {f"g{index}_{name}": _raw(kv) for name, kv in zip("kv", _stacked(group), strict=True)}
            for name, values in arrays.items():
                chunks = (*values.shape[:-2], CHUNK_TOKENS, values.shape[-1]) if values.ndim > 2 else (1 << 16,)
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
            tokens = np.asarray(root["token_ids"][...]).tolist()  # type: ignore[index]
            computed, groups = int(about["computed_tokens"]), list[GroupKV]()
            if _travels(pager.layouts):
                groups = [_group(root, index, layout, computed) for index, layout in enumerate(pager.layouts)]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not a whole session archive: {error}") from error
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
    dtype = getattr(torch, layout.dtype)
    k, v = (torch.from_numpy(np.asarray(root[f"g{index}_{name}"][...])).view(dtype) for name in "kv")
    if k.shape[:3] != (layout.num_layers, layout.num_kv_heads, computed) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"K of shape {tuple(k.shape)} does not hold {computed} tokens of this model")
    return GroupKV(list(zip(k, v, strict=True)), computed)
