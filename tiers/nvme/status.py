"""What a store at rest holds, read without its lock and without writing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .identity import MANIFEST_FILE, check_format, read_identity, stored_codecs, stored_layouts
from .manifest import replay


def read_store_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Blocks, bytes and sessions per layer group.

    Raises: ConfigError when there is no store, StoreMismatchError when it is of another format.
    """
    where = Path(path)
    identity = read_identity(where)
    check_format(where, identity)
    found = replay(where / MANIFEST_FILE)
    listing = found.listing
    codecs, groups = stored_codecs(where), []
    layouts = stored_layouts(where, identity)
    if len(codecs) != len(layouts):
        raise ConfigError(f"store {where}: {len(codecs)} arrays for {len(layouts)} layer groups")
    for index, layout in enumerate(layouts):
        stamps = listing.group(index).stamps[listing.group(index).slots()]
        groups.append(
            {
                "name": layout.name,
                "blocks": len(stamps),
                "bytes": len(stamps) * layout.block_bytes,
                "stored_bytes": int(stamps["stored_bytes"].sum()),
                "dtype": layout.dtype,
                "codec": codecs[index],
            }
        )
    return {
        "path": str(where),
        "format": identity.get("format"),
        "model_fingerprint": str(identity.get("model_fingerprint", ""))[:16],
        "groups": groups,
        "sessions": len(listing.sessions),
        "journal_gaps": found.gaps,
        "used_bytes": sum(group["bytes"] for group in groups),
    }
