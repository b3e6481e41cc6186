"""Which store a pager opens below it, and how large: from the configuration to an `NvmeTier`. The store itself is
tiers/nvme's business."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tiers.errors import ConfigError
from ..tiers.layout import KVLayout
from ..tiers.streams import Backend
from .config import PagerConfig
from .sizing import split_blocks
from .tier_formats import check_kept, store_codecs

if TYPE_CHECKING:
    from ..tiers.nvme.calls import SystemCalls
    from ..tiers.nvme.store import NvmeTier

NVME_DISK_SHARE = 0.8  # of the free disk, when nvme_bytes is not given


def stored_block_size(nvme_path: str | os.PathLike[str] | None) -> int | None:
    """Tokens per block of the store at that path, or None where there is no store. Raises ConfigError when unreadable."""
    from ..tiers.nvme.identity import STORE_FILE, read_identity, stored_layouts

    if nvme_path is None or not (Path(nvme_path) / STORE_FILE).exists():
        return None
    return stored_layouts(Path(nvme_path), read_identity(Path(nvme_path)))[0].block_size


def open_nvme(
    layouts: tuple[KVLayout, ...],
    config: PagerConfig,
    backend: Backend,
    fingerprint: str,
    about: Mapping[str, Any],
    calls: SystemCalls | None = None,
) -> NvmeTier | None:
    """None where no path is configured. Raises: ConfigError, StoreMismatchError, StoreLockedError."""
    if config.nvme_path is None:
        return None
    from ..tiers.nvme.codecs import NONE
    from ..tiers.nvme.store import NvmeTier, StoreIdentity

    codecs = store_codecs(config, layouts)
    recorded = _recorded_codecs(Path(config.nvme_path), len(layouts))
    check_kept(config.nvme_path, recorded, codecs)
    used = recorded or codecs or [NONE] * len(layouts)
    budget = config.nvme_size if config.nvme_size is not None else _free_disk(Path(config.nvme_path))
    sizes = [_usual_size(layout, codec) for layout, codec in zip(layouts, used, strict=True)]
    slots = split_blocks(layouts, budget, sizes)
    if min(slots) < 1 and config.nvme_size is not None:
        raise ConfigError(
            f"nvme_bytes={budget} holds no block; one of each layer group takes {sum(sizes)} bytes of disk"
        )
    return NvmeTier.open(
        config.nvme_path,
        StoreIdentity(fingerprint, layouts),
        num_slots=slots,
        backend=backend,
        durability=config.durability,
        segment_bytes=config.segment_size(),
        codecs=codecs,
        about=about,
        secrets=config.secrets_by_owner(),
        calls=calls,
    )


def _recorded_codecs(path: Path, num_groups: int) -> list[str] | None:
    """Those of the store that is there, if it can be one of this model; opening it says what is wrong with it."""
    from ..tiers.nvme.identity import STORE_FILE, stored_codecs

    if not (path / STORE_FILE).exists():
        return None
    try:
        codecs = stored_codecs(path)
    except ConfigError:
        return None
    return codecs if len(codecs) == num_groups else None


def _usual_size(layout: KVLayout, codec: str) -> int:
    """Bytes of disk that a block is counted with: the most that it can take, or under a format what a packed one takes."""
    from ..tiers.nvme.codecs import overhead_of, usual_bytes
    from ..tiers.nvme.layout import Geometry

    return Geometry.of(layout, 1, overhead_of(codec, layout)).counted_bytes(usual_bytes(codec, layout))


def _free_disk(path: Path) -> int:
    """Most of what the disk has left: NVME_DISK_SHARE of the free bytes at that place."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return int(shutil.disk_usage(there).free * NVME_DISK_SHARE)
