"""Conversations: sessions behind an EngineLoop, for a server. Many threads call; each session does one thing at a time.

A turn is told to be over when it is durable, so no such turn is lost by a crash; where the disk refused it, its output says
so. One that was cancelled or failed leaves the session as it was before the message. Sessions that nobody uses are parked
after a while.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..pager.sessions import check_session_id
from ..tiers.errors import (
    Busy,
    ConfigError,
    KvTierError,
    SessionChangedError,
    TierFullError,
    TierUnavailableError,
    UnknownSessionError,
)
from .engine import Engine
from .loop import EngineLoop, Listener, Submission
from .request import Request
from .sampling import Output, SamplingParams, TokenLogprob
from .session import Session
from .template import Message

IDLE_S = 300.0
IDLE_PARK_S = 60.0  # so long somebody waits for a session that is just being parked
MAX_FORKS = 64
_LOG = logging.getLogger("kvtier.engine")


@dataclass(frozen=True, slots=True)
class ConversationInfo:
    """A session from outside. `last_used_s` is seconds since the epoch, 0 when this process has not used it.

    `is_durable`: after a crash it would be as it is now.
    """

    id: str
    namespace: str
    tokens: int
    computed_tokens: int
    state: Literal["active", "parked", "busy"]
    is_durable: bool
    last_used_s: float


@dataclass(slots=True)
class _Held:
    """A session that this process has in its hands."""

    session: Session
    is_busy: bool = False
    is_idle: bool = False  # busy, with being parked by ourselves
    is_kept: bool = True  # all of it that is no message under way was stored, or is to be with its first turn
    used_s: float = 0.0  # monotonic
    used_at_s: float = field(default_factory=time.time)


class Conversations:
    """Of one loop. Blocking methods; none may be called on the loop's thread."""

    def __init__(self, loop: EngineLoop, *, idle_s: float = IDLE_S) -> None:
        self._loop, self._engine, self._idle_s = loop, loop.engine, idle_s
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # something is no longer busy
        self._held: dict[str, _Held] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._park_idle, name="kvtier-idle", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ what there is
    def create(self, session_id: str | None = None, *, namespace: str = "default") -> ConversationInfo:
        """A new, empty session. Raises ConfigError when the id is taken or cannot be one."""
        name = session_id or secrets.token_hex(12)

        def make(engine: Engine) -> Session:
            if engine.has_session(name):
                raise ConfigError(f"session {name!r} exists already; delete it first, or use another id")
            check_session_id(name)
            return engine.session(name, namespace)

        session = self._loop.call(make).result()
        with self._lock:
            self._held[name] = _Held(session, used_s=time.monotonic())
        return self.info(name, namespace=namespace)

    def info(self, session_id: str, *, namespace: str = "default") -> ConversationInfo:
        """Raises UnknownSessionError."""
        record = self._engine.pager.session(session_id)
        with self._lock:
            one = self._held.get(session_id)
        found = self._info(session_id, namespace, one, record)
        if found is None:
            raise _unknown(session_id, namespace)
        return found

    def list_sessions(self, namespace: str = "default") -> list[ConversationInfo]:
        """Every session of a namespace, by id."""
        stored = self._engine.pager.sessions()
        with self._lock:
            held = dict(self._held)
        names = sorted(stored.keys() | held.keys())
        found = (self._info(name, namespace, held.get(name), stored.get(name)) for name in names)
        return [one for one in found if one is not None]

    def _info(
        self, name: str, namespace: str, one: _Held | None, record: dict[str, Any] | None
    ) -> ConversationInfo | None:
        """Of a session that is held, stored or both; None where it is neither, or of another namespace."""
        if (one.session.namespace if one else record["namespace"] if record else "") != namespace:
            return None
        tokens, computed = (record["tokens"], record["computed_tokens"]) if record else (0, 0)
        seq = one.session.current_seq if one else None
        if seq is not None:
            try:
                tokens, computed = self._engine.pager.num_tokens(seq), self._engine.pager.num_computed(seq)
            except ConfigError:
                seq = None  # parked or deleted since
        is_stored = bool(record and record["is_durable"] and record["tokens"] == tokens)
        return ConversationInfo(
            id=name,
            namespace=namespace,
            tokens=tokens,
            computed_tokens=computed,
            state="busy" if one and one.is_busy and not one.is_idle else "active" if seq is not None else "parked",
            is_durable=is_stored and (one is None or one.is_kept),
            last_used_s=one.used_at_s if one else 0.0,
        )

    # ------------------------------------------------------------------ turns
    def send(
        self,
        session_id: str,
        message: str | Sequence[int] | Sequence[Message],
        params: SamplingParams,
        listener: Listener,
        *,
        namespace: str = "default",
        max_context: int | None = None,
        is_limit_open: bool = False,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Submission:
        """Answer a message; a parked session is resumed first. The listener hears the end when the turn is durable.

        `max_context`: most tokens that the session may have after the turn. `is_limit_open`: nobody chose max_tokens, so
        what does not fit is cut off. Raises: UnknownSessionError, Busy while another turn or verb is at work on it,
        ConfigError for the message.
        """
        held = self._claim(session_id, namespace)
        turn = _Turn(self, held, listener)

        def make(engine: Engine) -> Request:
            turn.request = held.session.turn(new, asked)
            turn.request.priority = priority
            return turn.request

        try:
            self._bring_back(held.session)
            new = held.session.encode(message)  # here, where no step waits for it
            known, capacity = self._engine.pager.num_tokens(held.session.seq), self._engine.pager.capacity_tokens()
            left = min(capacity, capacity if max_context is None else max_context) - known - len(new)
            asked = replace(params, max_tokens=min(params.max_tokens, max(left, 1))) if is_limit_open else params
            if max_context is not None and asked.max_tokens > left:
                raise ConfigError(
                    f"{known + len(new)} tokens of session and message and {asked.max_tokens} of answer are more than the "
                    f"context of {min(capacity, max_context)}; send less, lower max_tokens, or roll back"
                )
            return self._loop.submit_request(make, turn, timeout_s=timeout_s)
        except BaseException:
            if turn.request is not None:  # appended, but nobody takes it: the queue is full
                self._undo(held.session)
            self._let_go(held)
            raise

    def _finish_turn(self, held: _Held, request: Request) -> BaseException | None:
        """On a keeper thread: keep what was said, or take the message back. Returns what went wrong, if anything."""
        session, error = held.session, request.error
        try:
            if error is None and request.output.finish_reason in ("stop", "length"):
                session.took(request)
                held.is_kept = self._checkpoint(session)
                request.output.is_durable = self.info(session.id, namespace=session.namespace).is_durable
            else:
                self._undo(session)
        except KvTierError as failed:
            _LOG.warning("event=turn_not_durable session=%s reason=%s", session.id, failed)
            error = error or failed
            if isinstance(failed, SessionChangedError):
                self._leave(held)
        finally:
            self._let_go(held)
        return error

    def _undo(self, session: Session) -> None:
        """Take the message and what was answered back. Once the loop has ended nobody else touches the session."""
        try:
            self._loop.call(lambda engine: session.undo()).result()
        except TierUnavailableError:
            if self._loop.is_running:
                raise
            session.undo()

    def _leave(self, held: _Held) -> None:
        """Forget what we have of a session; the next message takes up what is stored."""
        self._loop.call(lambda engine: held.session.close()).result()
        with self._lock:
            self._held.pop(held.session.id, None)

    def _checkpoint(self, session: Session) -> bool:
        """Whether it was stored. A disk that takes nothing costs the turn its safety, not the chat its answer."""
        try:
            session.checkpoint()
        except (TierFullError, TierUnavailableError) as refused:
            _LOG.warning("event=turn_not_durable session=%s reason=%s", session.id, refused)
            return False
        return True

    # ------------------------------------------------------------------ verbs
    def park(self, session_id: str, *, namespace: str = "default") -> ConversationInfo:
        """Into the store now. Raises as Pager.park does; the session then stays active."""
        with self._hold(session_id, namespace) as held:
            self._park(held)
        return self.info(session_id, namespace=namespace)

    def resume(self, session_id: str, *, namespace: str = "default") -> ConversationInfo:
        """Start to bring a parked session's blocks up before its next turn."""
        with self._hold(session_id, namespace) as held:
            self._bring_back(held.session)
        return self.info(session_id, namespace=namespace)

    def fork(self, session_id: str, n: int = 1, *, namespace: str = "default") -> list[ConversationInfo]:
        """n sessions that go on from here, over the same blocks."""
        if not 1 <= n <= MAX_FORKS:
            raise ConfigError(f"n={n}: fork 1 to {MAX_FORKS} sessions at a time")
        with self._hold(session_id, namespace) as held:
            self._bring_back(held.session)
            children = self._loop.call(lambda engine: held.session.fork(n)).result()
            with self._lock:
                for child in children:
                    self._held[child.id] = _Held(child, used_s=time.monotonic())
            try:
                for child in children:
                    if self._engine.pager.num_tokens(child.seq):
                        self._loop.keep(child.checkpoint).result()
            except BaseException:
                for child in children:  # who asked knows no name of theirs
                    with suppress(KvTierError):
                        self.delete(child.id, namespace=namespace)
                raise
        return [self.info(child.id, namespace=namespace) for child in children]

    def rollback(self, session_id: str, num_tokens: int, *, namespace: str = "default") -> ConversationInfo:
        """Forget everything past the first num_tokens tokens."""
        with self._hold(session_id, namespace) as held:
            self._bring_back(held.session)
            self._loop.call(lambda engine: held.session.rollback(num_tokens)).result()
            held.is_kept = False
            self._loop.keep(held.session.checkpoint).result()
            held.is_kept = True
        return self.info(session_id, namespace=namespace)

    def delete(self, session_id: str, *, namespace: str = "default") -> None:
        """Forget the session; its own blocks are the first to leave every tier."""
        with self._hold(session_id, namespace) as held:

            def end(engine: Engine) -> None:
                held.session.close(released=True)
                if engine.pager.session(session_id) is not None:
                    engine.pager.forget(session_id, released=True)

            self._loop.call(end).result()
            with self._lock:
                del self._held[session_id]

    def export_session(self, session_id: str, path: Path, *, namespace: str = "default") -> None:
        """Write the session to a new file. Raises ConfigError when that cannot be."""
        with self._hold(session_id, namespace) as held:
            self._bring_back(held.session)
            self._loop.keep(lambda: held.session.export(path)).result()

    def import_session(self, session_id: str, path: Path, *, namespace: str = "default") -> ConversationInfo:
        """A new session with what export_session wrote, durable. Raises ConfigError, StoreMismatchError, TierFullError."""

        def load() -> Session:
            session = Session.load(self._engine, path, session_id, namespace)
            try:
                session.checkpoint()
            except BaseException:
                session.close(released=True)
                raise
            return session

        session = self._loop.keep(load).result()
        with self._lock:
            self._held[session_id] = _Held(session, used_s=time.monotonic())
        return self.info(session_id, namespace=namespace)

    # ------------------------------------------------------------------ ending
    def park_all(self, timeout_s: float = 60.0) -> int:
        """Park every session, waiting for those at work. Returns how many could not be."""
        deadline_s, failed = time.monotonic() + timeout_s, 0
        with self._lock:
            names = [(name, held.session.namespace) for name, held in self._held.items()]
        for name, namespace in names:
            try:
                with self._hold(name, namespace, until_s=deadline_s) as held:
                    self._park(held)
            except UnknownSessionError:
                pass  # deleted meanwhile
            except KvTierError as error:
                _LOG.warning("event=not_parked session=%s reason=%s", name, error)
                failed += 1
        return failed

    def close(self) -> None:
        """Stop parking idle sessions. Sessions stay as they are; see park_all."""
        self._stop.set()
        self._thread.join(30.0)

    # ------------------------------------------------------------------ inside
    def _claim(self, session_id: str, namespace: str, until_s: float = 0.0) -> _Held:
        """Waits for whoever is at work on it until then; for our own idle thread, of which nobody knows, in any case."""
        patient_s = time.monotonic() + IDLE_PARK_S
        self.info(session_id, namespace=namespace)  # or it is unknown
        session = None
        if session_id not in self._held:
            session = self._loop.call(lambda engine: self._known(engine, session_id, namespace)).result()
        with self._lock:
            held = self._held.get(session_id)
            if held is None:
                if session is None or not session.is_open:
                    raise _unknown(session_id, namespace)  # deleted meanwhile
                held = self._held[session_id] = _Held(session)
            while held.is_busy:
                left_s = max(until_s, patient_s if held.is_idle else 0.0) - time.monotonic()
                if left_s <= 0:
                    break
                self._idle.wait(left_s)
            if self._held.get(session_id) is not held:
                raise _unknown(session_id, namespace)  # likewise
            if held.is_busy:
                raise Busy(f"session {session_id!r} is at work; wait for its answer", retry_after_s=0.5)
            held.is_busy, held.used_s, held.used_at_s = True, time.monotonic(), time.time()
            return held

    @staticmethod
    def _known(engine: Engine, session_id: str, namespace: str) -> Session:
        if not engine.has_session(session_id):
            raise _unknown(session_id, namespace)  # deleted meanwhile
        return Session.known(engine, session_id, namespace)

    def _let_go(self, held: _Held) -> None:
        with self._lock:
            held.is_busy, held.is_idle, held.used_s = False, False, time.monotonic()
            self._idle.notify_all()

    @contextmanager
    def _hold(self, session_id: str, namespace: str, until_s: float = 0.0) -> Iterator[_Held]:
        held = self._claim(session_id, namespace, until_s)
        try:
            yield held
        finally:
            self._let_go(held)

    def _bring_back(self, session: Session) -> None:
        if session.is_parked:
            self._loop.keep(session.resume).result()

    def _park(self, held: _Held) -> None:
        session = held.session
        if not session.is_parked and self._engine.pager.num_tokens(session.seq):
            self._loop.keep(session.park).result()
            held.is_kept = True

    def _park_idle(self) -> None:
        while not self._stop.wait(min(1.0, self._idle_s / 4)):
            with self._lock:
                known = list(self._held.items())
            for name, held in known:
                if self._stop.is_set() or not self._claim_idle(name, held):
                    continue
                try:
                    self._park(held)
                except KvTierError as error:
                    _LOG.info("event=idle_not_parked session=%s reason=%s", name, error)
                finally:
                    self._let_go(held)

    def _claim_idle(self, name: str, held: _Held) -> bool:
        """Take a session that is there, active, and that nobody has used for a while. Whether it is one."""
        with self._lock:
            if held.is_busy or held.session.is_parked or self._held.get(name) is not held:
                return False
            held.is_busy = held.is_idle = time.monotonic() - held.used_s > self._idle_s
            return held.is_idle


def _unknown(session_id: str, namespace: str) -> UnknownSessionError:
    return UnknownSessionError(f"session {session_id!r} is unknown in namespace {namespace!r}")


class _Turn:
    """Passes on what a turn says; the end only once the turn is durable."""

    request: Request | None = None

    def __init__(self, conversations: Conversations, held: _Held, listener: Listener) -> None:
        self._conversations, self._held, self._listener = conversations, held, listener

    def on_token(self, index: int, token: int, logprob: TokenLogprob | None) -> bool:
        return self._listener.on_token(index, token, logprob)

    def on_end(self, index: int, output: Output, error: BaseException | None) -> None:
        def finish() -> None:
            assert self.request is not None
            try:
                failed = self._conversations._finish_turn(self._held, self.request)
            except Exception as unexpected:  # whoever waits for the end must hear of it
                _LOG.exception("event=turn_not_finished")
                failed = unexpected
            self._listener.on_end(index, output, failed)

        self._conversations._loop.keep(finish)
