"""Models: one SharedStore per model, layout and trust domain, within one budget of memory and disk for all of them.

Every model gets an equal part of both, `max_models` of them at once. A model whose clients are all gone stays, as cache,
until another one needs its part; then it is written down and closed, and its store on disk waits for its next client: it has
sessions that were acknowledged, so it is named in the log and never removed, whatever the disk is to hold.
Guards: tenants of two trust domains share neither a slab nor a store, so what one maps holds no byte of the other's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...tiers.errors import ConfigError, TierFullError
from ...tiers.layout import KVLayout, format_bytes
from ..config import PagerConfig

if TYPE_CHECKING:
    from ..core import Core
    from .client import Client
    from .reading import LeaseRequest
    from .store import SharedStore
    from .tenants import Tenant

CLOSE_TIMEOUT_S = 30.0
_LOG = logging.getLogger("kvtier.pagerd")
Identity = tuple[tuple[KVLayout, ...], str, str]  # layouts, model, trust domain


@dataclass(frozen=True, slots=True)
class Budget:
    """What all models share; `settings` are further ones of PagerConfig (durability, policy, secrets, ...)."""

    host_bytes: int
    nvme_path: Path | None = None
    nvme_bytes: int | None = None
    max_models: int = 1
    settings: Mapping[str, Any] | None = None

    def share(self, name: str) -> PagerConfig:
        """Of one model. Its store lies in a folder of its own."""
        parts = self.max_models
        return PagerConfig(
            device_bytes=0,
            host_bytes=self.host_bytes // parts,
            nvme_path=None if self.nvme_path is None else self.nvme_path / name,
            nvme_bytes=None if self.nvme_bytes is None or self.nvme_path is None else self.nvme_bytes // parts,
            backend="cpu",
            **(self.settings or {}),
        )


class Models:
    """The stores that are open, by number."""

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._clock = budget, clock
        self._stores: dict[int, SharedStore] = {}
        self._by_folder: dict[str, SharedStore] = {}
        self._numbers: dict[Identity, int] = {}
        self._next = 1
        self._opening = threading.Lock()
        self.on_progress: Callable[[], object] | None = None

    def attach(
        self, layouts: tuple[KVLayout, ...], fingerprint: str, about: Mapping[str, Any], tenant: Tenant
    ) -> tuple[int, SharedStore, Client]:
        """A client of that model's store, which is made where it is new. From any thread; one is made at a time.

        Raises: ConfigError, TierFullError when there are too many, StoreMismatchError, StoreLockedError.
        """
        if not layouts or len({layout.block_size for layout in layouts}) != 1:
            raise ConfigError(f"layouts: need at least one layer group, all of one block_size; got {len(layouts)}")
        identity = layouts, fingerprint, tenant.domain
        with self._opening:
            number = self._numbers.get(identity)
            if number is None:
                number = self._open(identity, about)
                self._numbers[identity] = number
            store = self._stores[number]
            return number, store, store.attach(tenant)

    def _open(self, identity: Identity, about: Mapping[str, Any]) -> int:
        from .store import SharedStore

        self._make_room()
        layouts, fingerprint, _ = identity
        folder = _folder(*identity)
        config = self._budget.share(folder)
        store = SharedStore.open(layouts, config, model_fingerprint=fingerprint, about=about, clock=self._clock)
        store.core.backend.on_progress = self._progress
        number, self._next = self._next, self._next + 1
        self._stores[number] = self._by_folder[folder] = store
        _LOG.info("event=open_model host_bytes=%d blocks=%s", config.host_size, _recovered(store))
        self._say_what_else_lies_there()
        return number

    def _say_what_else_lies_there(self) -> None:
        """Stores of models that are not open count for nothing in `nvme_bytes`."""
        path, bound = self._budget.nvme_path, self._budget.nvme_bytes
        for folder in sorted(path.glob("model-*") if path is not None else []):
            if folder.name not in self._by_folder:
                with suppress(OSError):  # somebody removes it just now
                    size = sum(512 * file.stat().st_blocks for file in folder.rglob("*"))
                    _LOG.warning("event=closed_store bytes=%d beside_nvme_bytes=%s path=%s", size, bound, folder)

    def block_size_of(self, fingerprint: str, domain: str) -> int:
        """Of the blocks that are open or stored for a model in a trust domain; 0 where there are none. On a thread."""
        for layouts, known, where in list(self._numbers):
            if (known, where) == (fingerprint, domain):
                return layouts[0].block_size
        return _stored_block_size(self._budget.nvme_path, fingerprint, domain)

    def store(self, number: int) -> SharedStore:
        return self._stores[number]

    def detach(self, number: int, client: Client) -> None:
        self._stores[number].detach(client)

    def cancel(self, number: int, client: Client, request: int) -> None:
        """A lease request, by its id(), is not waited for any more."""
        store = self._stores[number]
        with store.core.lock:
            for waiting in [r for r in client.requests if id(r) == request]:
                waiting.end()
                client.requests.remove(waiting)
                slots = waiting.slots[waiting.slots >= 0]
                client.holdings[waiting.group.index].release(slots)

    def advance(self) -> list[LeaseRequest]:
        return [request for store in list(self._stores.values()) for request in store.advance()]

    def cores(self) -> dict[int, Core]:
        """The pagers that are open, by number."""
        return {number: store.core for number, store in list(self._stores.items())}

    def pinned_slots(self) -> int:
        return sum(store.pinned_slots() for store in list(self._stores.values()))

    def check_integrity(self) -> None:
        for store in self._stores.values():
            store.check_integrity()

    def status(self) -> dict[str, Any]:
        """As a pager's, for the model opened last; the others under `models`."""
        from ..status import pager_status

        found = []
        for store in list(self._stores.values()):
            with store.core.locked():
                status = pager_status(store.core)
                del status["tiers"]["device"]  # there is none
                found.append(status)
        if not found:
            return _nothing_open(self._budget)
        return found[-1] | {"models": found[:-1]}

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Further settings of every model's pager from now on: quotas and secrets of those open, all of those to come.

        Raises ConfigError, and nothing is changed then.
        """
        budget = replace(self._budget, settings=settings)
        changed = [(store, budget.share(folder)) for folder, store in list(self._by_folder.items())]
        for _, config in changed:
            config.check_tiers()
        self._budget = budget
        for store, config in changed:
            store.reconfigure(config)

    def end_waits(self) -> None:
        """Whoever waits for room or for a disk gets TierUnavailableError at once."""
        for store in list(self._stores.values()):
            store.core.is_ending = True

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write down what only memory holds, and close every store, all within that time."""
        deadline_s = self._clock() + timeout_s
        for number in list(self._stores):
            self._close(number, max(0.0, deadline_s - self._clock()))

    def _make_room(self) -> None:
        if len(self._stores) < self._budget.max_models:
            return
        idle = [number for number, store in self._stores.items() if not store.clients]
        if not idle:
            raise TierFullError(
                f"{len(self._stores)} models are in use and max_models={self._budget.max_models}: raise it (each gets its "
                f"part of {format_bytes(self._budget.host_bytes)}), or end the clients of one",
                retry_after_s=1.0,
            )
        self._close(idle[0], CLOSE_TIMEOUT_S)

    def _close(self, number: int, timeout_s: float) -> None:
        store = self._stores.pop(number)
        self._by_folder = {folder: other for folder, other in self._by_folder.items() if other is not store}
        self._numbers = {identity: n for identity, n in self._numbers.items() if n != number}
        store.close(timeout_s)

    def _progress(self) -> None:
        if self.on_progress is not None:
            self.on_progress()


def _folder(layouts: tuple[KVLayout, ...], fingerprint: str, domain: str) -> str:
    """A name of ours for the model's store; nothing from outside becomes a path."""
    names = [fingerprint, [layout.to_dict() for layout in layouts], *([domain] if domain else [])]
    text = json.dumps(names, sort_keys=True)
    return "model-" + hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _stored_block_size(path: Path | None, fingerprint: str, domain: str) -> int:
    """Of the newest store of that model and domain on disk; whose a store is, its folder's name tells."""
    from ...tiers.nvme.identity import STORE_FILE, read_identity, stored_layouts

    folders = path.glob("model-*") if path is not None and path.is_dir() else []
    for folder in sorted((f for f in folders if (f / STORE_FILE).exists()), key=lambda f: -f.stat().st_mtime):
        try:
            layouts = stored_layouts(folder, read_identity(folder))
        except ConfigError:
            continue  # opening it says what is wrong
        if folder.name == _folder(layouts, fingerprint, domain):
            return layouts[0].block_size
    return 0


def _recovered(store: SharedStore) -> int:
    return sum(int(group.directory.is_live.sum()) for group in store.core.groups)


def _nothing_open(budget: Budget) -> dict[str, Any]:
    from .. import protocol

    return {"version": protocol.VERSION, "source": "daemon", "host_bytes": budget.host_bytes, "models": []}
