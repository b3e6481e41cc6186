"""Who a store belongs to: its directory, lock and identity file, and the refusals that leave nothing half-written.

Names on disk are ours alone; nothing from outside becomes a path. A store of another model, layout or format is refused
before anything is written.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StoreLockedError, StoreMismatchError
from ..layout import KVLayout
from .layout import Geometry

FORMAT = 2  # 1 had no seal over a block's crc
STORE_FILE, LOCK_FILE, MANIFEST_FILE, ZARR_DIR = "store.json", "LOCK", "manifest.log", "blocks.zarr"
PROBE_FILE = "probe.tmp"  # written and removed at open, to see what the file system takes
_OURS = {STORE_FILE, LOCK_FILE, MANIFEST_FILE, ZARR_DIR, "status.sock", "manifest.new", "store.json.new", PROBE_FILE}
_DIM_NAMES = ("slot", "layer", "kv", "head", "token", "dim")


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """Everything that must match before a block may be reused."""

    model_fingerprint: str
    layouts: tuple[KVLayout, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_fingerprint": self.model_fingerprint,
            "layouts": [layout.to_dict() for layout in self.layouts],
        }


def claim(path: Path, identity: StoreIdentity) -> tuple[int, bool]:
    """Make or check the directory and take its lock. Returns the lock's fd and whether the store is new.

    Raises: ConfigError (a file, foreign files, not writable), StoreLockedError, StoreMismatchError.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"nvme_path={str(path)!r} is a file; give a directory")
    is_new = not (path / STORE_FILE).exists()
    if is_new and path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _OURS)
        if foreign:
            raise ConfigError(
                f"nvme_path={str(path)!r} is not a kvtier store and not empty (it holds {foreign[0]!r}); give an empty "
                "or new directory"
            )
    if not is_new:
        check_identity(path, identity)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"nvme_path={str(path)!r} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreLockedError(f"store {path} is in use by process {owner}; end it or use another path") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd, is_new


def check_identity(path: Path, identity: StoreIdentity) -> None:
    """Raises StoreMismatchError naming what differs."""
    stored = read_identity(path)
    for name, wanted in identity.to_dict().items():
        if stored.get(name) != wanted:
            raise StoreMismatchError(
                f"store {path} was made with {name}={_short(stored.get(name))}, this model has {_short(wanted)}; "
                "use another path for this model, or delete the store"
            )


def read_identity(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / STORE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"store {path} has no readable {STORE_FILE}: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"store {path}: {STORE_FILE} is not an object")
    return stored


def make_arrays(path: Path, identity: StoreIdentity, num_slots: list[int]) -> None:
    """Write the Zarr metadata (by zarr-python itself, so it is always stock) and, last, the identity file."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    group = zarr.create_group(str(path / ZARR_DIR), overwrite=True, attributes={"kvtier": identity.to_dict()})
    for index, (layout, slots) in enumerate(zip(identity.layouts, num_slots, strict=True)):
        geometry = Geometry.of(layout)
        chunk = (1, *layout.block_shape)
        kinds = _DIM_NAMES if len(chunk) == len(_DIM_NAMES) else ("slot", "layer", "element")
        names = [f"g{index}_{kind}" for kind in kinds]  # of its own, so that xarray takes groups of other sizes
        group.create_array(
            f"g{index}",
            shape=(_whole_segments(slots, geometry), *layout.block_shape),
            chunks=(geometry.slots_per_segment, *layout.block_shape),
            dtype=layout.storage_dtype,
            serializer=ShardingCodec(
                chunk_shape=chunk,
                codecs=[BytesCodec(), Crc32cCodec()],
                index_codecs=[BytesCodec(), Crc32cCodec()],
                index_location="start",
            ),
            compressors=None,
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=names,
            attributes={"kvtier": {"dtype": layout.dtype, "layout": layout.to_dict()}},
        )
    temporary = path / (STORE_FILE + ".new")
    temporary.write_text(json.dumps(identity.to_dict(), indent=1))
    temporary.replace(path / STORE_FILE)


def grow_arrays(path: Path, identity: StoreIdentity, num_slots: list[int]) -> None:
    """Let the arrays' shapes reach at least num_slots. zarr is loaded only when one has to grow.

    Raises ConfigError when the store's Zarr metadata cannot be read.
    """
    for index, (layout, slots) in enumerate(zip(identity.layouts, num_slots, strict=True)):
        file = path / ZARR_DIR / f"g{index}" / "zarr.json"
        try:
            has = int(json.loads(file.read_text())["shape"][0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"store {path}: {file.name} of array g{index} cannot be read: {error}") from error
        wanted = _whole_segments(slots, Geometry.of(layout))
        if has < wanted:
            import zarr

            array = zarr.open_array(str(file.parent), mode="r+")
            array.resize((wanted, *array.shape[1:]))


def segment_path(path: Path, layout: KVLayout, group: int, segment: int) -> Path:
    """The shard's file: chunk key `c.<segment>.0...` of array g<group>."""
    return path / ZARR_DIR / f"g{group}" / ("c." + ".".join([str(segment), *["0"] * len(layout.block_shape)]))


def _whole_segments(slots: int, geometry: Geometry) -> int:
    return -(-max(slots, 1) // geometry.slots_per_segment) * geometry.slots_per_segment


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
