"""Who a store belongs to: its directory, lock and identity file, and the refusals that leave nothing half-written.

Names on disk are ours alone; nothing from outside becomes a path. A store of another model, layout or format is refused
before anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from ..errors import ConfigError, StoreLockedError, StoreMismatchError
from ..layout import KVLayout
from .below import stores_below
from .calls import REAL_CALLS, SystemCalls, replace_file
from .codecs import check_codec, overhead_of
from .disk_settings import DISK_FILE
from .layout import Geometry
from .zarr_metadata import array_metadata, group_metadata

FORMAT = 4  # 1: no seal over a block's crc; 2: segments of one size, stamps without an owner; 3: without stored bytes
STORE_FILE, LOCK_FILE, MANIFEST_FILE, ZARR_DIR = "store.json", "LOCK", "manifest.log", "blocks.zarr"
PROBE_FILE = "probe.tmp"  # written and removed at open, to see what the file system takes
SPARE_DIR = "blocks.new"  # Zarr metadata on its way
NEW_SEGMENT_FILE = "segment.new"  # a segment until it is whole
AHEAD_SEGMENT_FILE = "segment.ahead"  # likewise, of one that nobody waits for yet
SESSIONS_DIR, SPARE_SESSIONS_FILE = "sessions.zarr", "sessions.new"  # see session_table.py
_OURS = {STORE_FILE, LOCK_FILE, MANIFEST_FILE, ZARR_DIR, "status.sock", "store.json.new"}
_OURS |= {"manifest.new", "manifest.damaged"}  # a snapshot on its way, and a copy of a journal that was damaged
_OURS |= {"status.sock.page", "status.sock.page.new", "status.sock.history"}  # see pager/inspection
_OURS |= {PROBE_FILE, NEW_SEGMENT_FILE, AHEAD_SEGMENT_FILE, SPARE_DIR, SESSIONS_DIR, SPARE_SESSIONS_FILE, DISK_FILE}


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


def claim(path: Path, identity: StoreIdentity, calls: SystemCalls) -> tuple[int, bool]:
    """Make or check the directory and take its lock. Returns the lock's fd and whether the store is new.

    Raises: ConfigError (a file, foreign files, not writable), StoreLockedError, StoreMismatchError.
    """
    _is_new(path, identity)  # what has to be refused is refused before anything is made
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in made:
            _sync_parent(folder, calls)
        fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"nvme_path={str(path)!r} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreLockedError(f"store {path} is in use by process {owner}; end it or use another path") from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        is_new = _is_new(path, identity)  # another process may have had it between the first look and the lock
        if is_new:
            path.chmod(0o700)
        return fd, is_new
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"nvme_path={str(path)!r} cannot be written: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise


def _is_new(path: Path, identity: StoreIdentity) -> bool:
    """Whether a store has yet to be made here. Raises as `claim` does."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"nvme_path={str(path)!r} is a file; give a directory")
    if (path / STORE_FILE).exists():
        check_identity(path, identity)
        return False
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _OURS) if path.is_dir() else []
    if foreign:
        raise ConfigError(
            f"nvme_path={str(path)!r} is not a kvtier store and not empty (it holds {foreign[0]!r}); give an empty "
            "or new directory"
        )
    return True


def _sync_parent(folder: Path, calls: SystemCalls) -> None:
    """Have the name of a folder last, where whoever made it may open what it lies in. Raises OSError."""
    with contextlib.suppress(PermissionError):
        calls.sync_directory(folder.parent)


def check_identity(path: Path, identity: StoreIdentity) -> None:
    """Raises StoreMismatchError naming what differs."""
    stored = read_identity(path)
    check_format(path, stored)
    for name, wanted in identity.to_dict().items():
        if stored.get(name) != wanted:
            raise StoreMismatchError(
                f"store {path} was made with {name}={_short(stored.get(name))}, this model has {_short(wanted)}; "
                "use another path for this model, or delete the store"
            )


def check_format(path: Path, stored: Mapping[str, Any]) -> None:
    """Raises StoreMismatchError."""
    if stored.get("format") != FORMAT:
        raise StoreMismatchError(
            f"store {path} has format={stored.get('format')!r}, this version of kvtier reads and writes {FORMAT} only: use "
            "another path, or delete the store (what it holds is a cache and can be computed again)"
        )


def read_identity(path: Path) -> dict[str, Any]:
    """The identity file, proven by its own sum. Raises ConfigError."""
    try:
        stored = json.loads((path / STORE_FILE).read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is no store: no readable {STORE_FILE} is there; name the directory of a store{stores_below(path)}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"store {path} has no readable {STORE_FILE}: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"store {path}: {STORE_FILE} is not an object")
    if stored.get("format") == FORMAT and stored.pop("sum", None) != _sum_of(stored):
        raise ConfigError(f"store {path}: {STORE_FILE} is damaged; restore it from a copy, or delete the store")
    return stored


def stored_layouts(path: Path, stored: Mapping[str, Any]) -> tuple[KVLayout, ...]:
    """The layouts that an identity file names. Raises ConfigError."""
    try:
        layouts = tuple(KVLayout.from_dict(fields) for fields in stored["layouts"])
        if not layouts:
            raise ValueError("no layer group")
        return layouts
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(f"store {path}: {STORE_FILE} does not say what its blocks are: {error!r:.200}") from error


def make_arrays(
    path: Path,
    identity: StoreIdentity,
    num_slots: list[int],
    codecs: Sequence[str],
    about: Mapping[str, Any],
    segment_bytes: int,
    calls: SystemCalls = REAL_CALLS,
) -> list[Geometry]:
    """Write the Zarr metadata and, last, the identity file; each lasts before the next is written.

    `about` describes the model to whoever opens the store without kvtier; it is kept in the group's attributes.
    Raises OSError.
    """
    geometries = [
        Geometry.for_room(layout, n, overhead_of(codec, layout), segment_bytes)
        for layout, n, codec in zip(identity.layouts, num_slots, codecs, strict=True)
    ]
    _write_metadata(path / ZARR_DIR, identity, geometries, num_slots, codecs, about, calls)
    arrays = [
        {"slots_per_segment": geometry.slots_per_segment, "metadata_sum": _metadata_sum(path, index), "codec": codec}
        for index, (geometry, codec) in enumerate(zip(geometries, codecs, strict=True))
    ]
    _write_whole(path / STORE_FILE, {**identity.to_dict(), "about": dict(about), "arrays": arrays}, calls)
    return geometries


def repair_metadata(path: Path, identity: StoreIdentity, calls: SystemCalls = REAL_CALLS) -> bool:
    """Write the Zarr metadata anew where it is not what we wrote. True when there was something to mend. Raises OSError."""
    stored, geometries = read_identity(path), stored_geometries(path, identity)
    if all(_is_ours(path, index, array) for index, array in enumerate(stored["arrays"])):
        return False
    folders = [path / ZARR_DIR / f"g{index}" for index in range(len(geometries))]
    slots = [_reached(folder, geometry) for folder, geometry in zip(folders, geometries, strict=True)]
    spare = path / SPARE_DIR
    _write_metadata(spare, identity, geometries, slots, stored_codecs(path, identity), stored.get("about", {}), calls)
    for part in (Path(), *(Path(folder.name) for folder in folders)):
        calls.replace(spare / part / "zarr.json", path / ZARR_DIR / part / "zarr.json")
        calls.sync_directory(path / ZARR_DIR / part)
    shutil.rmtree(spare)
    return True


def _write_metadata(
    folder: Path,
    identity: StoreIdentity,
    geometries: list[Geometry],
    num_slots: list[int],
    codecs: Sequence[str],
    about: Mapping[str, Any],
    calls: SystemCalls,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    said = {"version": _version(), "about": dict(about), **identity.to_dict()}
    _write_json(folder, group_metadata(said), calls)
    arrays = zip(identity.layouts, geometries, num_slots, codecs, strict=True)
    for index, (layout, geometry, slots, codec) in enumerate(arrays):
        slots = _whole_segments(slots, geometry)
        _write_json(folder / f"g{index}", array_metadata(index, layout, geometry, slots, codec), calls)


def stored_geometries(path: Path, identity: StoreIdentity) -> list[Geometry]:
    """How the store's arrays are cut into segments. Raises ConfigError."""
    try:
        counts = [int(array["slots_per_segment"]) for array in read_identity(path)["arrays"]]
        if min(counts) < 1:
            raise ValueError("slots_per_segment must be at least 1")
        overheads = map(overhead_of, stored_codecs(path, identity), identity.layouts)
        return [Geometry.of(*parts) for parts in zip(identity.layouts, counts, overheads, strict=True)]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"store {path}: {STORE_FILE} does not say how its arrays are cut: {error}") from error


def stored_codecs(path: Path, identity: StoreIdentity | None = None) -> list[str]:
    """The codec of each of the store's arrays. Raises ConfigError."""
    try:
        names = [check_codec(array["codec"]) for array in read_identity(path)["arrays"]]
        if identity is not None and len(names) != len(identity.layouts):
            raise ValueError(f"{len(names)} arrays for {len(identity.layouts)} layer groups")
        return names
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"store {path}: {STORE_FILE} does not say how its arrays are stored: {error}") from error


def grow_arrays(
    path: Path, identity: StoreIdentity, num_slots: list[int], calls: SystemCalls = REAL_CALLS
) -> list[Geometry]:
    """Let the arrays' shapes reach at least num_slots.

    Raises ConfigError when the store's Zarr metadata is not what we wrote, and OSError.
    """
    geometries = stored_geometries(path, identity)
    arrays = read_identity(path)["arrays"]
    for index, (geometry, slots) in enumerate(zip(geometries, num_slots, strict=True)):
        file = path / ZARR_DIR / f"g{index}" / "zarr.json"
        if not _is_ours(path, index, arrays[index]):
            raise ConfigError(
                f"store {path}: {file.name} of array g{index} is not as kvtier wrote it; `kvtier store repair {path}` "
                "writes it anew"
            )
        array, wanted = json.loads(file.read_text()), _whole_segments(slots, geometry)
        if array["shape"][0] < wanted:
            array["shape"][0] = wanted
            _write_json(file.parent, array, calls)
    return geometries


def segment_path(path: Path, layout: KVLayout, group: int, segment: int) -> Path:
    """The shard's file: chunk key `c.<segment>.0...` of array g<group>."""
    return path / ZARR_DIR / f"g{group}" / ("c." + ".".join([str(segment), *["0"] * len(layout.block_shape)]))


def _whole_segments(slots: int, geometry: Geometry) -> int:
    return -(-max(slots, 1) // geometry.slots_per_segment) * geometry.slots_per_segment


def _is_ours(path: Path, index: int, array: Mapping[str, Any]) -> bool:
    try:
        return _metadata_sum(path, index) == array.get("metadata_sum")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _metadata_sum(path: Path, index: int) -> str:
    """Of everything in an array's and the group's zarr.json but how many blocks there may be, which grows."""
    group = json.loads((path / ZARR_DIR / "zarr.json").read_text())
    array = json.loads((path / ZARR_DIR / f"g{index}" / "zarr.json").read_text())
    if not isinstance(array["shape"].pop(0), int):
        raise ValueError("the first length is not a number")
    return _sum_of([group, array])


def _reached(folder: Path, geometry: Geometry) -> int:
    """Slots in the segments that there are files of."""
    numbers = [int(file.name.split(".")[1]) for file in folder.glob("c.*")]
    return (max(numbers, default=0) + 1) * geometry.slots_per_segment


def _version() -> str:
    try:
        return version("kvtier")
    except PackageNotFoundError:
        return "not installed"


def _sum_of(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _write_whole(path: Path, fields: dict[str, Any], calls: SystemCalls) -> None:
    data = json.dumps({**fields, "sum": _sum_of(fields)}, indent=1).encode()
    replace_file(calls, path, data, path.with_name(path.name + ".new"))
    calls.sync_directory(path.parent)


def _write_json(folder: Path, metadata: Mapping[str, Any], calls: SystemCalls) -> None:
    """A node's zarr.json, whole or not at all, also after a power loss."""
    is_made = not folder.exists()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_made:
        calls.sync_directory(folder.parent)
    replace_file(calls, folder / "zarr.json", json.dumps(metadata, indent=2).encode(), folder / "zarr.new")
    calls.sync_directory(folder)


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
