"""How session records lie in the store's journal: as they are, or sealed where the store is encrypted.

A sealed record tells its namespace's tag and its size, nothing else: the session's id, token ids and whatever the
application added are inside, and the journal's name of it is a keyed hash. Guards: a record that does not open is left
where it is, for whoever has its secret, and is no session here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..tiers.nvme.sealing import RecordSealer, is_sealed
from .sessions import SessionEntry

if TYPE_CHECKING:
    from .below import LowerTier
    from .core import Core

_LOG = logging.getLogger("kvtier.pager")


class SessionRecords:
    """Of one store."""

    def __init__(self, core: Core, store: LowerTier) -> None:
        self._core, self._store = core, store

    @property
    def _sealer(self) -> RecordSealer | None:
        """None where the store is not encrypted. With the secrets that are known now."""
        return RecordSealer(self._core.config.secrets_by_owner()) if self._store.is_encrypted else None

    def put(self, entry: SessionEntry) -> None:
        """Raises TierUnavailableError when the journal takes no more."""
        record, sealer = entry.to_record(), self._sealer
        name_and_record = (entry.session_id, record) if sealer is None else sealer.wrap(entry.session_id, record)
        self._store.put_session(*name_and_record)

    def drop(self, entry: SessionEntry) -> None:
        sealer = self._sealer
        name = entry.session_id if sealer is None else sealer.name(entry.session_id, entry.namespace)
        self._store.drop_session(name)

    def read(self) -> Iterator[SessionEntry]:
        """Every session whose record can be read here."""
        num_closed, sealer = 0, self._sealer
        for name, record in self._store.sessions().items():
            if not is_sealed(record):
                yield SessionEntry.from_record(name, record)
                continue
            opened = sealer.unwrap(name, record) if sealer is not None else None
            if opened is None:
                num_closed += 1
            else:
                yield SessionEntry.from_record(*opened)
        if num_closed:
            _LOG.error(
                "event=sessions_do_not_open count=%d reason=no_or_another_secret: they stay in the store; give the secrets "
                "that they were stored under in namespace_secrets",
                num_closed,
            )
