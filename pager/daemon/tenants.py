"""Tenants: who is behind a connection, decided by the socket and a token, never by a message.

A tenant owns namespaces, by name; blocks carry the tag of their namespace, and a tenant sees blocks of its own tags
alone. Tables of tenants come from the configuration; the default knows one, the user that the daemon runs as.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...tiers.owners import owner_of, unsalted


@dataclass(frozen=True)
class Tenant:
    """`namespaces`: name -> secret. `owns_all`: every other namespace too. `maps_slab`: trusted with the memory itself, of
    its `domain`."""

    name: str
    namespaces: Mapping[str, bytes] = field(default_factory=dict)
    owns_all: bool = False
    maps_slab: bool = True
    domain: str = ""
    tags: npt.NDArray[np.uint32] = field(init=False)

    def __post_init__(self) -> None:
        tags = sorted({owner_of(name) for name in self.namespaces})
        object.__setattr__(self, "tags", np.array(tags, np.uint32))

    @property
    def tag(self) -> int:
        """One that stands for bytes of this tenant; 1 for who owns all."""
        return int(self.tags[0]) if len(self.tags) else 1

    def covers(self, other: Tenant) -> bool:
        """Whether this one may do all that the other may."""
        owns = self.owns_all or (not other.owns_all and self.namespaces.keys() >= other.namespaces.keys())
        return owns and self.maps_slab >= other.maps_slab and self.domain == other.domain

    def owns(self, namespace: str) -> bool:
        return self.owns_all or unsalted(namespace) in self.namespaces

    def owns_tags(self, tags: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of these are of its namespaces. Takes as long for foreign ones as for own."""
        return np.ones(len(tags), bool) if self.owns_all else np.isin(tags, self.tags)


class Tenants(Protocol):
    """The table that a server asks once per connection."""

    def find(self, uid: int, token: str, gids: Collection[int] = ()) -> Tenant | None:
        """Who this is, or None: the connection is refused."""


class OwnerOnly:
    """The daemon's own user owns everything; nobody else is let in."""

    def __init__(self, secrets: Mapping[str, bytes] | None = None) -> None:
        self._tenant = Tenant("owner", secrets or {}, owns_all=True)

    def find(self, uid: int, token: str, gids: Collection[int] = ()) -> Tenant | None:
        return self._tenant if uid == os.getuid() else None
