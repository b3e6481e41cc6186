"""A copy of the table of parked sessions that any Zarr client can read: the attributes of a group beside the blocks.

For readers only, and only as new as the last commit; the journal is what counts, nothing of ours reads this back. It is
replaced whole, never waited for by a sync, and made anew when the store is opened, so a crash can leave an old table or
none but no wrong session anywhere. A disk that refuses it costs readers the table and nobody else anything. Session ids
are in the JSON only; no name on disk comes from them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .calls import SystemCalls, replace_file
from .identity import SESSIONS_DIR, SPARE_SESSIONS_FILE

_HEAD = (
    '{"zarr_format": 3, "node_type": "group", "attributes": {"kvtier": {"note": "a copy for readers, as of the last '
    'commit; kvtier itself reads manifest.log", "sessions": [\n'
)
_TAIL = "\n]}}}\n"
_LOG = logging.getLogger("kvtier.nvme")


class SessionTable:
    """Follows the journal's sessions: `put` and `drop` with it, then `snapshot` before its sync and `write` after.

    Cost: one JSON line per session is kept as text, so a write is one join and one file.
    """

    def __init__(self, path: Path, sessions: Mapping[str, Mapping[str, Any]], calls: SystemCalls) -> None:
        self._path, self._calls = path, calls
        self._lines = {session_id: _line(session_id, record) for session_id, record in sessions.items()}
        is_needed = bool(sessions) or (path / SESSIONS_DIR).exists()  # a crash may have left an old one
        self._version, self._written = int(is_needed), 0

    def put(self, session_id: str, record: Mapping[str, Any]) -> None:
        self._lines[session_id] = _line(session_id, record)
        self._version += 1

    def drop(self, session_id: str) -> None:
        self._version += self._lines.pop(session_id, None) is not None

    def snapshot(self) -> tuple[int, list[str]] | None:
        """What to write once the journal is synced, or None when that is written."""
        return None if self._version == self._written else (self._version, list(self._lines.values()))

    def write(self, snapshot: tuple[int, list[str]]) -> None:
        """Replace the table. A refusal is logged, and the table written again after the next change."""
        self._written, lines = snapshot
        spare = self._path / SPARE_SESSIONS_FILE
        try:
            (self._path / SESSIONS_DIR).mkdir(mode=0o700, exist_ok=True)
            data = (_HEAD + ",\n".join(lines) + _TAIL).encode()
            replace_file(self._calls, self._path / SESSIONS_DIR / "zarr.json", data, spare, is_synced=False)
        except OSError as error:
            _LOG.warning("event=no_session_table reason=%s", error.strerror)


def _line(session_id: str, record: Mapping[str, Any]) -> str:
    """What the pager wrote for readers (`summary`) under the session's id; token ids are not part of it."""
    return json.dumps({"id": session_id, **record.get("summary", {})})
