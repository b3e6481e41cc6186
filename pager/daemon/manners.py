"""What a daemon does besides serving: say that it is ready and alive, take new limits on SIGHUP, show metrics, end in time.

The server calls `begin` and `drain`; everything else happens on the loop by itself. Guards: a reload that is refused leaves
the daemon as it was and says so; a drain ends at its deadline, whoever waits for longer is told so, and what could not be
written down was a cache.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ...tiers.errors import KvTierError
from .metrics import DaemonMetrics, MetricsServer
from .notify import Notifier
from .reload import plan_reload
from .service import LOOK_S
from .settings import DaemonConfig
from .table import TenantTable

if TYPE_CHECKING:
    from .models import Models
    from .service import Service

QUIET_SHARE = 0.5  # of the time to drain: so long may requests that are under way take
_LOG = logging.getLogger("kvtier.pagerd")


class Manners:
    """Of one daemon. `reread` gives the configuration anew, from the same places as at the start."""

    def __init__(self, config: DaemonConfig, reread: Callable[[], DaemonConfig], notifier: Notifier) -> None:
        self.config, self._reread, self._notifier = config, reread, notifier
        self._metrics: MetricsServer | None = None
        self._watchdog: asyncio.TimerHandle | None = None

    async def begin(self, service: Service, tenants: object) -> None:
        """From now on clients are served. Raises ConfigError where metrics cannot be."""
        loop = asyncio.get_running_loop()
        if self.config.metrics is not None:
            self._metrics = await MetricsServer.start(self.config.metrics, DaemonMetrics(service).text)
        loop.add_signal_handler(signal.SIGHUP, self.reload, service, tenants)
        self._notifier.send("READY=1", f"STATUS=serving on {self.config.socket_path}")
        self._keep_alive(loop)

    # ------------------------------------------------------------------ SIGHUP
    def reload(self, service: Service, tenants: object) -> None:
        """Take what can be taken from the configuration as it is now."""
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            plan = plan_reload(self.config, self._reread())
            service.models.reconfigure(plan.config.pager_settings())
        except KvTierError as error:
            _LOG.error("event=reload_refused reason=%s", error)
        else:
            self.config = plan.config
            service.limits = plan.config.limits
            if isinstance(tenants, TenantTable):
                tenants.update(plan.config)
                service.show_out()
            logging.getLogger().setLevel(plan.config.log_level.upper())
            for name in plan.refused:
                _LOG.warning("event=reload_needs_restart setting=%s", name)
            _LOG.info("event=reload changed=%s", ",".join(plan.changed) or "nothing")
        self._notifier.send("READY=1")

    # ------------------------------------------------------------------ the end
    async def drain(self, service: Service, models: Models, hurry: asyncio.Event) -> None:
        """Let running requests end, then write down what only memory holds; all of it within `drain_s`."""
        deadline_s = time.monotonic() + self.config.limits.drain_s
        quiet_s = time.monotonic() + QUIET_SHARE * self.config.limits.drain_s
        self._notifier.send(
            "STOPPING=1", "STATUS=draining", f"EXTEND_TIMEOUT_USEC={int(self.config.limits.drain_s * 1e6)}"
        )
        while service.num_waiting and time.monotonic() < quiet_s and not hurry.is_set():
            await asyncio.sleep(LOOK_S)
        if service.num_waiting:
            _LOG.warning("event=drain_cut_short requests=%d", service.num_waiting)
        await service.send_away(deadline_s)
        service.close()
        left_s = 0.0 if hurry.is_set() else max(0.0, deadline_s - time.monotonic())
        await asyncio.to_thread(models.close, left_s)
        self.close()

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._metrics is not None:
            self._metrics.close()
        with suppress(RuntimeError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    def _keep_alive(self, loop: asyncio.AbstractEventLoop) -> None:
        """From the loop itself: a daemon whose loop hangs is not alive."""
        if self._notifier.watchdog_s is not None:
            self._notifier.send("WATCHDOG=1", wait_s=0.0)  # it hears again soon
            self._watchdog = loop.call_later(self._notifier.watchdog_s, self._keep_alive, loop)
