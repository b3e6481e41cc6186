"""Remote: what a pager needs of its daemon beyond the tier below it, in the pager's own words; and how both are made.

Prompts are looked up before they are matched; sessions are the daemon's, and one of them is in one process at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...tiers.errors import ConfigError, KvTierError, TierUnavailableError, UnknownSessionError
from ...tiers.layout import KVLayout
from ...tiers.streams import Backend
from ..config import PagerConfig
from ..core import Core
from ..keys import KeyChain, unsalted
from ..page_table import Sequence as TokenSequence
from ..parking import Parking
from ..prefix import Match
from ..rules import Rules
from ..sessions import SessionEntry
from ..sizing import Sizes, plan_sizes
from ..tier_formats import refuse_formats
from ..wire import messages as m
from .address import read_token
from .attachment import Attachment
from .connection import DaemonConnection, Greeting
from .daemon_copies import DaemonCopies
from .link import Link
from .sharing import Sharing, attach_slabs
from .slab import LeasedSlab
from .tier import RemoteTier

IPC = "ipc"  # of config.transfer
_CLOSE_S = 5.0
_MAX_EXPECTED = 1024
PRIVATE_HOST_BYTES = 64 << 20  # of our own, where the daemon's memory is not ours to map and host_bytes is not given


class Remote:
    """Of one client pager."""

    def __init__(
        self,
        core: Core,
        tier: RemoteTier,
        sharing: Sharing,
        link: Link,
        slabs: list[LeasedSlab] | None,
        copies: DaemonCopies | None,
    ) -> None:
        self._core, self._tier, self._sharing, self._link, self._slabs = core, tier, sharing, link, slabs
        self._copies = copies
        self._expected: dict[int, int] = {}  # sequences whose blocks the daemon was asked to bring up: how many

    @classmethod
    def connect(
        cls,
        address: str,
        layouts: tuple[KVLayout, ...],
        config: PagerConfig,
        backend: Backend,
        *,
        model_fingerprint: str,
        about: Mapping[str, Any],
        greeting: Greeting,
        rules: Rules,
        clock: Callable[[], float],
    ) -> tuple[Core, Remote]:
        """Attach, and make a core over what is there. Raises: ConfigError, TierUnavailableError, ProtocolError."""
        if config.nvme_path is not None:
            raise ConfigError(
                f"nvme_path={str(config.nvme_path)!r} with a daemon: the daemon keeps the store; leave it out"
            )
        refuse_formats(config, who="a daemon")
        link = Link(address, layouts, model_fingerprint, about, greeting)
        attachment = link.open()
        try:
            slabs = _slabs_for(attachment)
            tier = RemoteTier(attachment, backend, slabs, link.is_up)
            for index, slab in enumerate(slabs or ()):
                slab.ask_with(index, tier.ask_for_room)
            attach_slabs(slabs, attachment, backend, populate=config.host_prefault)
            config = _with_secrets(config, attachment)
            sizes = _sizes(layouts, config, slabs)
            wants_ipc = config.transfer == IPC
            core = Core(
                *(layouts, config, sizes, backend, tier, model_fingerprint, rules, clock, slabs),
                exports_pools=wants_ipc,
            )
            copies = DaemonCopies(core, link.dial) if wants_ipc else None
            if copies is not None:
                copies.use(copies.prepare(attachment))
        except BaseException:
            attachment.connection.close()
            raise
        tier.copies = copies
        sharing = Sharing(core, tier, slabs, copies)
        return core, cls(core, tier, sharing, link, slabs, copies)

    def start(self, on_change: Callable[[], object]) -> None:
        """Watch the daemon from now on."""
        self._link.on_change = on_change
        self._link.keep(self._sharing, self._tier.attachment)

    @property
    def is_up(self) -> bool:
        return self._link.is_up()

    @property
    def shares_memory(self) -> bool:
        return self._tier.attachment.has_slab

    def close(self, timeout_s: float) -> None:
        """Before the tier is closed: nobody reattaches any more."""
        self._link.close(timeout_s)

    def leave(self, *, is_drained: bool) -> None:
        """At the end: give everything back, or where copies may still run, let the daemon wait for this process."""
        for slab in self._slabs or ():
            if slab.is_pinned and is_drained:
                self._core.backend.unpin(slab.rows)
        is_over = is_drained and self._tier.attachment.goodbye()
        if not is_drained:
            self._tier.attachment.connection.close()
        if self._copies is not None:
            self._copies.close(_CLOSE_S, is_over=is_over)

    # ------------------------------------------------------------------ namespaces
    def check_owned(self, namespace: str) -> None:
        """Raises ConfigError for a namespace that the daemon does not let us use."""
        welcome = self._tier.attachment.connection.welcome
        if not welcome.owns_all and unsalted(namespace) not in welcome.namespaces:
            owned = ", ".join(sorted(map(str, welcome.namespaces))) or "none"
            raise ConfigError(f"namespace={namespace!r} is not ours at this daemon; it gives us: {owned}")

    # ------------------------------------------------------------------ prompts
    def find_prompt(
        self, namespace: str, token_ids: Sequence[int], *, with_tail: bool, branch: tuple[int, str] | None = None
    ) -> None:
        """So that matching this prompt finds what the daemon has. `branch`: as of a sequence."""
        with self._core.lock:
            chain = self._core.chain(namespace)
        if branch is not None:
            chain = chain.branched(*branch)
        keys: list[bytes] = []
        chain.extend(keys, token_ids)
        self._sharing.find(chain, keys)
        if with_tail:
            self._find_tails(chain, keys, token_ids)

    def _find_tails(self, chain: KeyChain, keys: list[bytes], token_ids: Sequence[int]) -> None:
        """Behind the longest run of whole blocks."""
        with self._core.lock:
            count = len(keys)
            for group in self._core.groups:
                if group.layout.window is None:
                    has = group.directory.is_valid(group.directory.find(keys[:count]))
                    count = count if has.all() else int(has.argmin())
        start = count * self._core.block_size
        self._sharing.find_tail(chain, keys[:count], token_ids[start:])

    def find_next(self, seq: TokenSequence, max_tokens: int) -> None:
        """So that a prefill finds what others have computed meanwhile; only where it could go on from."""
        size = self._core.block_size
        with self._core.lock:
            if seq.num_computed % size:
                return
            first = seq.num_computed // size
            last = min(len(seq.token_ids) - 1, seq.num_computed + max_tokens) // size
            seq.chain.extend(seq.keys, seq.token_ids[: last * size])
            keys = seq.keys[first:last]
        if keys:
            self._sharing.find(seq.chain, keys, first)

    def hint(self, keys: list[bytes], hint: str) -> None:
        """Tell the daemon, in the background, what we know of a chain of blocks; see HINT in the protocol."""
        if keys and self.is_up:
            self._tier.hint(keys, hint)

    def mark(self, keys: list[bytes], hint: str, ttl_s: float = 0.0) -> None:
        """As `hint`, for what the daemon can only do to blocks that it has: told once it has those that are on their way."""
        with self._core.lock:
            self._sharing.marks.note(keys, hint, ttl_s)

    def expect(self, seq: int, keys: list[bytes]) -> None:
        """This sequence will soon read the blocks of these keys; told once per sequence and length."""
        if len(keys) > self._expected.get(seq, 0) and self.is_up:
            self._expected.pop(seq, None)
            self._expected[seq] = len(keys)
            while len(self._expected) > _MAX_EXPECTED:
                del self._expected[next(iter(self._expected))]
            self._tier.hint(keys, m.PREFETCH)

    def used(self, keys: list[bytes], num_tokens: int, found: Match, *, is_turn: bool = False) -> None:
        """Tell the daemon of a request and of what it found, waiting for no answer. Not under the pager's lock."""
        if num_tokens > 0 and self.is_up:
            self._tier.used(keys, num_tokens, found, is_turn=is_turn)

    # ------------------------------------------------------------------ sessions
    def take_session(self, session_id: str, namespace: str) -> None:
        """Make the daemon's session ours, to be resumed. Raises: UnknownSessionError, Busy, TierUnavailableError."""
        with self._core.lock:
            known = self._core.sessions.get(session_id)
            if known is not None and known.active_seq in self._core.sequences:
                return  # the pager says that it is busy
        if not self.is_up:
            raise TierUnavailableError(f"session {session_id!r}: the daemon that keeps it is gone; try again later")
        record = self._tier.attachment.take_session(session_id)
        is_durable = bool(record.pop("is_durable", False))
        entry = SessionEntry.from_record(session_id, record)
        if entry.namespace != namespace:
            self._tier.attachment.drop_session(session_id, keep=True)
            raise UnknownSessionError(f"session {session_id!r} is unknown in namespace {namespace!r}")
        self._tier.claims.saw(session_id, record)
        entry.is_durable = is_durable
        computed = entry.token_ids[: entry.num_computed]
        self.find_prompt(namespace, computed, with_tail=True, branch=entry.branch)
        with self._core.lock:
            self._core.sessions[session_id] = entry

    def give_back_session(self, session_id: str, parking: Parking) -> None:
        """It is no longer active here; the daemon has its record, and holds its blocks."""
        with self._core.locked():
            entry = self._core.sessions.pop(session_id, None)
            if entry is not None:
                parking.let_go(entry)
        if self.is_up:
            try:
                self._tier.attachment.drop_session(session_id, keep=True)
            except KvTierError:
                pass  # never stored, or the daemon went: it is nobody's then

    def sessions(self) -> dict[str, dict[str, Any]]:
        """What the daemon lists, as Pager.sessions does."""
        if not self.is_up:
            return {}
        fields = ("namespace", "tokens", "computed_tokens", "is_active", "is_durable")
        return {row[0]: dict(zip(fields, row[1:], strict=True)) for row in self._tier.attachment.list_sessions()}

    def forget_session(self, session_id: str, *, released: bool = False) -> None:
        """Raises: UnknownSessionError, TierUnavailableError."""
        self._tier.drop_session(session_id, released=released)


def block_size_at(address: str, model_fingerprint: str, config: PagerConfig) -> int | None:
    """How the daemon's blocks of this model are cut, or None where it has none. Raises as `DaemonConnection.open` does."""
    greeting = Greeting("block size", read_token(config.pager_token_file), ca_file=config.pager_ca)
    connection = DaemonConnection.open(address, greeting)
    try:
        if connection.version < 2:
            return None
        return connection.call(m.FindModel(model_fingerprint), m.ModelFound).block_size or None
    finally:
        connection.close()


def _slabs_for(attachment: Attachment) -> list[LeasedSlab] | None:
    if not attachment.has_slab:
        return None
    return [LeasedSlab(limit) for limit in attachment.lease_limits]


def _sizes(layouts: tuple[KVLayout, ...], config: PagerConfig, slabs: list[LeasedSlab] | None) -> Sizes:
    staging = config.staging_size
    if slabs is None:
        return plan_sizes(
            layouts,
            config.device_size,
            config.host_size or PRIVATE_HOST_BYTES,
            staging,
            True,
            selection=config.selection_size,
        )
    sizes = plan_sizes(layouts, config.device_size, 0, staging, False, selection=config.selection_size)
    return replace(sizes, host_slots=[slab.num_slots for slab in slabs], bounce_bytes=sizes.staging_bytes)


def _with_secrets(config: PagerConfig, attachment: Attachment) -> PagerConfig:
    """Secrets are the daemon's to give: all clients must make the same keys."""
    given = attachment.connection.welcome.namespaces
    secrets = {str(name): secret.hex() for name, secret in given.items() if isinstance(secret, bytes)}
    return replace(config, namespace_secrets={**config.namespace_secrets, **secrets})
