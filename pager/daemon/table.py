"""The table of tenants: uid, gid or token of a connection -> the namespaces that it owns, as the configuration says.

A tenant is the sum of what its uid, its groups and its token name. Nothing that a client sends but its token has a say.
Guards: whoever is in no row is not let in; a peer from another machine (uid -1) has its token alone; the slab itself, which
holds the blocks of all namespaces of a trust domain, is handed only to the daemon's own user and to `slab_uids`. One
connection has namespaces of one domain.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .secret_files import matches
from .settings import DaemonConfig, NamespaceSettings
from .tenants import OwnerOnly, Tenant, Tenants

_LOG = logging.getLogger("kvtier.pagerd")


@dataclass(frozen=True, slots=True)
class _Row:
    namespace: str
    uids: frozenset[int]
    gids: frozenset[int]
    tokens: tuple[str, ...]
    domain: str

    @classmethod
    def of(cls, namespace: str, settings: NamespaceSettings) -> _Row:
        return cls(
            namespace, frozenset(settings.uids), frozenset(settings.gids), settings.tokens, settings.trust_domain
        )


class TenantTable:
    """As of one configuration; `update` with another. Who is let in for more finds it with its next connection."""

    def __init__(self, config: DaemonConfig) -> None:
        self._own_uid = os.geteuid()
        self.update(config)

    def update(self, config: DaemonConfig) -> None:
        self._secrets: Mapping[str, bytes] = {name: config.secret(name) for name in config.namespaces}
        self._rows = [_Row.of(name, settings) for name, settings in config.namespaces.items()]
        self._slab_uids = frozenset(config.slab_uids)

    def find(self, uid: int, token: str, gids: Collection[int] = ()) -> Tenant | None:
        """Who this is, or None. Looks at every row, whatever it finds."""
        is_local, names, domains = uid >= 0, [], set()
        for row in self._rows:
            by_token = any(matches(token, row.tokens))
            by_peer = is_local and (uid in row.uids or not row.gids.isdisjoint(gids))
            if by_token or by_peer:
                names.append(row.namespace)
                domains.add(row.domain)
        if len(domains) > 1:
            _LOG.warning("event=refuse_client uid=%d reason=namespaces of trust domains %s", uid, sorted(domains))
        if len(domains) != 1:
            return None
        maps_slab = is_local and (uid == self._own_uid or uid in self._slab_uids)
        secrets = {name: self._secrets[name] for name in names}
        return Tenant(",".join(names), secrets, maps_slab=maps_slab, domain=domains.pop())


def tenants_of(config: DaemonConfig) -> Tenants:
    """The table, or for a daemon without namespaces its own user alone."""
    return TenantTable(config) if config.namespaces else OwnerOnly()
