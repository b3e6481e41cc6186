"""SessionClaims: what this process saw last of each session's record, so that it replaces none that it has not seen.

A lost socket frees the sessions that it had, and another process may have gone on with one since. So who puts a session that
it does not have over this connection takes it first, and compares what is there with what it put or took last. Guards: an
acknowledged turn is replaced only by who knows it, whatever version the daemon speaks.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgpack

from ...tiers.errors import Busy, ConfigError, KvTierError, SessionChangedError, UnknownSessionError

if TYPE_CHECKING:
    from .attachment import Attachment

MAX_SEEN = 1 << 16
_SAID = ("namespace", "token_ids", "extra", "branch")  # the rest of a record is the daemon's to say


class SessionClaims:
    """Of one pager, over all of its attachments."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, set[bytes]] = {}  # digests: of the last record, and of puts since that nobody answered

    def saw(self, session_id: str, record: Mapping[str, Any]) -> None:
        """It was taken, or put, and this is its record."""
        self._note(session_id, {_digest(record)})

    def put(self, attachment: Attachment, session_id: str, record: dict[str, Any], timeout_s: float) -> None:
        """Put it where nobody else has changed it, asking again while the daemon is busy; it is ours then.

        Raises: SessionChangedError, or ConfigError for a record that we have not seen; Busy while another process has it;
        as PUT_SESSION else.
        """
        had_it, deadline_s = session_id in attachment.sessions, time.monotonic() + timeout_s + 5.0
        try:
            while True:
                try:
                    self._put(attachment, session_id, record, timeout_s)
                    return
                except Busy as busy:
                    if deadline_s - time.monotonic() <= busy.retry_after_s:
                        raise
                    time.sleep(busy.retry_after_s)
        except BaseException:
            if not had_it:  # also where it may be stored all the same
                with suppress(KvTierError):
                    attachment.drop_session(session_id, keep=True)
            raise

    def forget(self, session_id: str) -> None:
        with self._lock:
            self._seen.pop(session_id, None)

    # ------------------------------------------------------------------ inside
    def _put(self, attachment: Attachment, session_id: str, record: dict[str, Any], timeout_s: float) -> None:
        if session_id not in attachment.sessions:
            with suppress(UnknownSessionError):  # new, or the daemon lost its store: nothing is replaced
                self._require_seen(session_id, attachment.take_session(session_id))
        said = _digest(record)
        self._note(session_id, self._seen.get(session_id, set()) | {said})  # it may be stored and no answer come
        attachment.put_session(session_id, record, timeout_s)
        self._note(session_id, {said})

    def _require_seen(self, session_id: str, found: Mapping[str, Any]) -> None:
        seen = self._seen.get(session_id)
        if seen is None:
            raise ConfigError(f"session {session_id!r} exists already: resume it, or forget it first")
        if _digest(found) not in seen:
            raise SessionChangedError(
                f"session {session_id!r} was changed by another process since; release it and resume it again"
            )

    def _note(self, session_id: str, digests: set[bytes]) -> None:
        with self._lock:
            self._seen.pop(session_id, None)
            self._seen[session_id] = digests
            while len(self._seen) > MAX_SEEN:
                del self._seen[next(iter(self._seen))]


def _digest(record: Mapping[str, Any]) -> bytes:
    said = msgpack.packb([record.get(name) for name in _SAID], use_bin_type=True)
    return hashlib.blake2b(said, digest_size=16).digest()
