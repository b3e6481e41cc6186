"""Blocks of a store as others see them: zarr-python and tensorstore, without kvtier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Row


def rows(case: str, path: Path, wanted: Mapping[int, bytes]) -> list[Row]:
    """How many of these blocks, by slot of the first array of a `blocks.zarr`, each of them reads as they were written."""
    found = []
    for name, reader in (("zarr-python", _of_zarr), ("tensorstore", _of_tensorstore)):
        metric = f"read back with {name}"
        try:
            read = reader(path)
        except ImportError:
            found.append(Row(case, metric, 0, "blocks", "not installed"))
            continue
        right = sum(read(slot) == block for slot, block in wanted.items())
        found.append(Row(case, metric, right, "blocks", "written", len(wanted), right / len(wanted) or None))
    return found


def _of_zarr(path: Path) -> Callable[[int], bytes]:
    import zarr

    array: Any = zarr.open_group(str(path), mode="r")["g0"]
    return lambda slot: np.asarray(array[slot]).tobytes()


def _of_tensorstore(path: Path) -> Callable[[int], bytes]:
    import tensorstore

    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "g0")}}
    array = tensorstore.open(store, read=True).result()
    return lambda slot: np.asarray(array[slot].read().result()).tobytes()
