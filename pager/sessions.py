"""Parked sessions: what is remembered of a conversation while it is in no sequence.

A record holds token ids, not text and not keys: the keys follow from the ids and the namespace's secret, so a record in
the wrong hands names no block. The one exception is a tail that is the beginning of a block whose other tokens were
taken back: nothing else says how that block is named. While a session is parked its tables hold references, so no tier
drops its last copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..tiers.errors import ConfigError
from .page_table import BlockTable

RECORD_VERSION = 1
MAX_SESSION_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class ParkedSession:
    """A session as `resume` gives it back: `num_computed` tokens of `token_ids` need no computing."""

    session_id: str
    token_ids: list[int]
    num_computed: int
    extra: dict[str, Any]


@dataclass(slots=True)
class SessionEntry:
    """The pager's own view: parked (tables hold references) or active (a sequence does)."""

    session_id: str
    namespace: str
    token_ids: list[int]
    num_computed: int
    extra: dict[str, Any]
    tables: list[BlockTable] | None = None
    active_seq: int | None = None
    is_durable: bool = False
    tail_keys: list[bytes] = field(default_factory=list)  # per group; none where the tail is named by what it holds
    branch: tuple[int, str] | None = None  # as of the sequence
    summary: dict[str, Any] = field(default_factory=dict)  # for whoever opens the store without kvtier; JSON values

    def to_record(self) -> dict[str, Any]:
        return {
            "version": RECORD_VERSION,
            "namespace": self.namespace,
            "token_ids": np.asarray(self.token_ids, "<u4").tobytes(),
            "num_computed": self.num_computed,
            "extra": self.extra,
            "tail_keys": self.tail_keys,
            "branch": list(self.branch or []),
            "summary": self.summary,
        }

    @classmethod
    def from_record(cls, session_id: str, record: dict[str, Any]) -> SessionEntry:
        """Raises ConfigError for a record of another version, or one that is not whole."""
        if not isinstance(record, dict) or record.get("version") != RECORD_VERSION:
            version = record.get("version") if isinstance(record, dict) else record
            raise ConfigError(
                f"session {session_id!r} was stored in format {version!r}; this version reads {RECORD_VERSION}"
            )
        for name, kind in _FIELDS.items():
            if not isinstance(record.get(name, _OPTIONAL.get(name)), kind):
                raise ConfigError(
                    f"session {session_id!r}: its record has no {kind.__name__} {name!r}; delete the store"
                )
        token_ids, num_computed = record["token_ids"], record["num_computed"]
        if len(token_ids) % 4 or not 0 <= num_computed <= len(token_ids) // 4:
            raise ConfigError(
                f"session {session_id!r}: its record counts {num_computed} computed tokens of {len(token_ids) / 4}; "
                "delete the store"
            )
        return cls(
            session_id,
            record["namespace"],
            np.frombuffer(token_ids, "<u4").tolist(),
            num_computed,
            record["extra"],
            is_durable=True,
            tail_keys=[key for key in record.get("tail_keys", []) if isinstance(key, bytes)],
            branch=_branch(session_id, record.get("branch", [])),
            summary=record.get("summary", {}),
        )


_FIELDS = {
    "namespace": str,
    "token_ids": bytes,
    "num_computed": int,
    "extra": dict,
    "tail_keys": list,
    "branch": list,
    "summary": dict,
}
_OPTIONAL: dict[str, Any] = {"tail_keys": [], "branch": [], "summary": {}}


def _branch(session_id: str, told: list[Any]) -> tuple[int, str] | None:
    if not told:
        return None
    if len(told) != 2 or not isinstance(told[0], int) or not isinstance(told[1], str) or told[0] < 0:
        raise ConfigError(
            f"session {session_id!r}: its record's branch {told!r:.80} is not (token, name); delete the store"
        )
    return told[0], told[1]


def check_session_id(session_id: str, *, most: int = MAX_SESSION_ID_BYTES) -> str:
    """Session ids are data, never paths; still they are bounded and not empty."""
    if not session_id or len(session_id.encode()) > most:
        raise ConfigError(f"session id {session_id[:40]!r}: need 1 to {most} bytes")
    return session_id
