"""SIGHUP: which settings of a running daemon can change, and which wait for a restart. Decides; the server applies.

Limits, quotas, who owns a namespace, new namespaces and the log level change at once. What memory, disk and sockets were
made from does not, nor the secret of a namespace or its trust domain: its blocks are named and sealed with the one, and lie
in the memory of the other. Guards: a file that is refused changes nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from .settings import DaemonConfig, NamespaceSettings

LIVE = ("limits", "namespaces", "namespace_quotas", "namespace_secrets", "slab_uids", "log_level")
_FILES = ("namespaces", "namespace_quotas", "namespace_secrets")


@dataclass(frozen=True, slots=True)
class Reload:
    """`config` is to be in force; `changed` and `refused` name settings."""

    config: DaemonConfig
    changed: tuple[str, ...]
    refused: tuple[str, ...]


def plan_reload(old: DaemonConfig, new: DaemonConfig) -> Reload:
    """Of the new configuration, what can be had without a restart."""
    differs = [f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name)]
    refused = [name for name in differs if name not in LIVE and name != "root_secret_file"]
    moved = _other_secrets(old.namespace_secrets, new.namespace_secrets)
    if moved:
        refused += [f"namespaces.{name}.secret" for name in moved]
        new = _with_secrets_of(old, new, moved)
    for name in sorted(old.namespaces.keys() & new.namespaces.keys()):
        domain = old.namespaces[name].trust_domain
        if new.namespaces[name].trust_domain != domain:
            refused.append(f"namespaces.{name}.trust_domain")
            stays = replace(new.namespaces[name], trust_domain=domain)
            new = replace(new, namespaces={**new.namespaces, name: stays})
    if bool(old.namespaces) != bool(new.namespaces):
        refused.append("namespaces")  # the table comes with the first namespace, and goes with the last
        new = replace(new, **{name: getattr(old, name) for name in _FILES})
    config = replace(old, **{name: getattr(new, name) for name in LIVE})
    changed = [name for name in LIVE if name not in _FILES[1:] and getattr(config, name) != getattr(old, name)]
    return Reload(config, tuple(changed), tuple(refused))


def _other_secrets(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return sorted(name for name in old.keys() & new.keys() if old[name] != new[name])


def _with_secrets_of(old: DaemonConfig, new: DaemonConfig, names: list[str]) -> DaemonConfig:
    """The new configuration, but that these namespaces keep the secrets that they have."""
    kept: dict[str, NamespaceSettings] = {
        name: replace(new.namespaces[name], secret_file=old.namespaces[name].secret_file) for name in names
    }
    secrets = {**new.namespace_secrets, **{name: old.namespace_secrets[name] for name in names}}
    return replace(new, namespaces={**new.namespaces, **kept}, namespace_secrets=secrets)
