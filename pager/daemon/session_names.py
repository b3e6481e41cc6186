"""Session names: an id is of a namespace, so tenants who choose the same one have a session each.

In a daemon's books, in its store and for its operator a session is called `NAMESPACE/ID`; its clients know the id alone.
Guards: no tenant learns from an answer, or from a refusal, which ids another one has, and none can take them away.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...tiers.owners import unsalted
from ..sessions import MAX_SESSION_ID_BYTES, SessionEntry
from .tenants import Tenant

MARK = "/"  # in no name of a namespace
MAX_NAME_BYTES = 2 * MAX_SESSION_ID_BYTES + len(MARK)  # the name of a namespace takes less than an id


def name_for(tenant: Tenant, namespace: str, session_id: str) -> str:
    """What a session of this tenant is called in the books. Who owns all namespaces is alone with its ids."""
    return session_id if tenant.owns_all else unsalted(namespace) + MARK + session_id


def names_of(tenant: Tenant, session_id: str) -> list[str]:
    """Everything that a session with this id may be called, if it is this tenant's."""
    names = [namespace + MARK + session_id for namespace in sorted(tenant.namespaces)]
    return [*names, session_id]  # the id alone: stored while the daemon had no namespaces


def find(tenant: Tenant, session_id: str, sessions: Mapping[str, SessionEntry]) -> SessionEntry | None:
    """This tenant's session of that id; what is not there and what is another's are the same."""
    entries = [sessions.get(name) for name in names_of(tenant, session_id)]
    return next((entry for entry in entries if entry is not None and tenant.owns(entry.namespace)), None)


def id_of(entry: SessionEntry) -> str:
    """What its clients call it."""
    return entry.session_id.removeprefix(unsalted(entry.namespace) + MARK)
