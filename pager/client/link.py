"""Link: keeps a pager attached to its daemon. When the daemon goes the pager goes on; when one is there again, it is told.

One thread, asleep while all is well. It looks for a daemon with growing pauses, says in HELLO which attachment was ours
before (its copies are over by then), and hands the new one to `Sharing`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...tiers.errors import ConfigError, KvTierError
from ...tiers.layout import KVLayout
from .attachment import Attachment
from .connection import DaemonConnection, Greeting
from .sharing import Sharing

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5
DIAL_TIMEOUT_S = 2.0
_LOG = logging.getLogger("kvtier.client")


class Link:
    """Of one pager. `opens` makes an attachment."""

    def __init__(
        self,
        address: str,
        layouts: Sequence[KVLayout],
        model_fingerprint: str,
        about: Mapping[str, Any],
        greeting: Greeting,
    ) -> None:
        self._address, self._layouts = address, tuple(layouts)
        self._fingerprint, self._about, self._greeting = model_fingerprint, dict(about), greeting
        self._is_up = False
        self._gone, self._stop = threading.Event(), threading.Event()
        self._sharing: Sharing | None = None
        self._thread: threading.Thread | None = None
        self.num_losses = 0
        self.on_change: Callable[[], object] = lambda: None

    def is_up(self) -> bool:
        return self._is_up

    def open(self) -> Attachment:
        """The first attachment. Raises what `Attachment.open` does."""
        attachment = self._attach(self._greeting)
        self._is_up = not attachment.is_lost
        return attachment

    def dial(self) -> DaemonConnection:
        """One more connection, with nothing open in it. Raises as `DaemonConnection.open` does."""
        return DaemonConnection.open(self._address, self._greeting, timeout_s=DIAL_TIMEOUT_S)

    def keep(self, sharing: Sharing, attachment: Attachment) -> None:
        """From now on look after this pager."""
        self._sharing = sharing
        self._watch(attachment)
        self._thread = threading.Thread(target=self._run, args=(attachment,), name="kvtier-link", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._stop.set()
        self._gone.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------ inside
    def _attach(self, greeting: Greeting) -> Attachment:
        return Attachment.open(self._address, self._layouts, self._fingerprint, self._about, greeting)

    def _watch(self, attachment: Attachment) -> None:
        def gone() -> None:
            self._is_up = False
            self._gone.set()

        attachment.connection.on_lost = gone
        if attachment.is_lost:
            gone()

    def _run(self, attachment: Attachment) -> None:
        assert self._sharing is not None
        while True:
            self._gone.wait()
            if self._stop.is_set():
                return
            self._gone.clear()
            self.num_losses += 1
            _LOG.warning("event=daemon_gone address=%s", self._address)
            self._sharing.lost()
            found = self._look_for_daemon(attachment)
            if found is None:
                return
            attachment = found

    def _look_for_daemon(self, previous: Attachment) -> Attachment | None:
        """None when told to stop."""
        assert self._sharing is not None
        pause_s = FIRST_PAUSE_S
        while not self._stop.wait(pause_s):
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                found = self._attach_again(previous)
            except ConfigError as error:
                _LOG.warning("event=attach_refused reason=%s", error)
                continue
            except KvTierError:
                continue
            if found is None:
                return None
            if self._fits(found, previous) and self._sharing.attached(found, self._stop):
                self._is_up = True
                self._watch(found)
                self._sharing.find_again()
                _LOG.warning("event=daemon_back address=%s", self._address)
                self.on_change()
                return found
            found.goodbye()
        return None

    def _attach_again(self, previous: Attachment) -> Attachment | None:
        """None when told to stop while our copies had to end first."""
        assert self._sharing is not None
        found = self._attach(self._greeting)
        boot = previous.connection.welcome.boot
        if found.connection.welcome.boot != boot:
            return found
        found.goodbye()  # the daemon that we had: its slots are still leased to us, and we may still be reading them
        if not self._sharing.leave_memory(self._stop):
            return None
        return self._attach(replace(self._greeting, previous_boot=boot, previous_epoch=previous.epoch))

    def _fits(self, found: Attachment, previous: Attachment) -> bool:
        """Slots are planned once: a daemon that gives fewer of them, or memory where there was none, is of no use."""
        fits = found.has_slab == previous.has_slab and all(
            new >= old for new, old in zip(found.lease_limits, previous.lease_limits, strict=True)
        )
        if not fits:
            _LOG.warning("event=attach_refused reason=the daemon at %s has less memory than before", self._address)
        return fits
