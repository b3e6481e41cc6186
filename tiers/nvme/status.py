"""What a store at rest holds, read without its lock and without writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..layout import KVLayout
from .identity import MANIFEST_FILE, read_identity
from .manifest import replay


def read_store_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Blocks, bytes and sessions per layer group. Raises ConfigError when there is no store."""
    where = Path(path)
    identity = read_identity(where)
    listing = replay(where / MANIFEST_FILE)
    groups = []
    for index, fields in enumerate(identity.get("layouts", [])):
        layout = KVLayout.from_dict(fields)
        blocks = len(listing.group(index).slots())
        groups.append(
            {"name": layout.name, "blocks": blocks, "bytes": blocks * layout.block_bytes, "dtype": layout.dtype}
        )
    return {
        "path": str(where),
        "format": identity.get("format"),
        "model_fingerprint": str(identity.get("model_fingerprint", ""))[:16],
        "groups": groups,
        "sessions": len(listing.sessions),
        "used_bytes": sum(group["bytes"] for group in groups),
    }
