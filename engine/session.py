"""Session: one conversation, kept as token ids, in a sequence while it runs and in the store while it is parked.

The last sampled token of a turn is known but not computed: the next turn computes it with the new tokens. So nothing is
computed twice, and a resumed session goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pager.sessions import check_session_id
from ..tiers.errors import ConfigError
from .archive import export_sequence, import_sequence
from .request import Request
from .sampling import Output, SamplingParams
from .template import Message, end_tokens, render_messages

if TYPE_CHECKING:
    from .engine import Engine


class Session:
    """Open with `engine.session(session_id)`."""

    def __init__(self, engine: Engine, session_id: str, namespace: str, seq: int | None) -> None:
        self.id, self.namespace = session_id, namespace
        self._engine = engine
        self._seq = seq
        self._rng_state: bytes | None = None  # of the last sampled turn
        self._turn_start = 0  # tokens before the last message
        self.is_open = True

    @classmethod
    def open(cls, engine: Engine, session_id: str, namespace: str) -> Session:
        if engine.pager.session(session_id) is not None:
            session = cls(engine, session_id, namespace, None)
            session.resume()
            return session
        return cls(engine, session_id, namespace, engine.pager.begin(namespace))

    @classmethod
    def known(cls, engine: Engine, session_id: str, namespace: str) -> Session:
        """The session as it is, without resuming it. The id must be known to the pager or open."""
        found = engine.open_session(session_id)
        if found is None:
            found = cls(engine, session_id, namespace, None)
            engine.add_session(found)
        return found

    @property
    def current_seq(self) -> int | None:
        """The pager's sequence, or None while the session is parked or closed."""
        return self._seq

    @property
    def seq(self) -> int:
        """The pager's sequence. Raises ConfigError while the session is parked, and after it was closed."""
        if not self.is_open:
            raise ConfigError(f"session {self.id!r} was closed; open it again with engine.session({self.id!r})")
        if self._seq is None:
            raise ConfigError(f"session {self.id!r} is parked; call resume() first")
        return self._seq

    @property
    def is_parked(self) -> bool:
        return self.is_open and self._seq is None

    @property
    def token_ids(self) -> list[int]:
        return self._engine.pager.token_ids(self.seq)

    @property
    def num_computed(self) -> int:
        return self._engine.pager.num_computed(self.seq)

    def send(
        self,
        message: str | Sequence[int] | Sequence[Message],
        params: SamplingParams | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Output:
        """Append a message (text and chat messages need a tokenizer) and generate. max_tokens=0 only warms the cache.

        A sampled turn without a seed goes on with the random numbers of the turn before, across park and resume too. After
        an error the session is as it was before the message.
        """
        request = self.turn(self.encode(message), params or SamplingParams())
        if on_token is not None:
            request.on_token = lambda _, token: on_token(token)
        try:
            self._engine.run([request])
        except BaseException:
            self._engine.drop(request)
            self.undo()
            raise
        self._engine.drop(request)
        return self.took(request)

    def turn(self, new: Sequence[int], params: SamplingParams) -> Request:
        """Append an encoded message and make the request that answers it. Whoever runs it calls `took` or `undo` afterwards.

        What is refused was never said: nothing is appended and nothing is counted.
        """
        if params.n != 1 or params.num_beams != 1:
            raise ConfigError("n, num_beams: a session answers once per turn, token by token; fork it for more")
        engine = self._engine
        engine.check_params(params)
        known = engine.pager.num_tokens(self.seq)
        engine.check_length(known + len(new) + params.max_tokens)
        if not new and self.num_computed == known:
            raise ConfigError("send: the message is empty, there is nothing to compute")
        self._turn_start = known
        try:
            if known:
                match = engine.pager.turn(self.seq, new)
            else:
                match = engine.pager.attach(self.seq, new[:-1])
                engine.pager.append(self.seq, new[match.tokens :])
            return engine.continue_request(self.seq, len(new), params, self._rng_state, match)
        except BaseException:
            self.undo()
            raise

    def took(self, request: Request) -> Output:
        """The turn is whole: remember its random numbers, decode its text."""
        if request.params.temperature > 0:
            self._rng_state = request.sampler.rng_state
        if self._engine.tokenizer is not None:
            request.output.text = self._engine.tokenizer.decode(request.output.token_ids)
        return request.output

    def undo(self) -> None:
        """The turn did not come to its end: the session is as it was before the message."""
        self._engine.pager.truncate(self.seq, self._turn_start)

    def inject(self, token_ids: Sequence[int], cache: Any) -> None:
        """Fill an empty session with tokens whose K/V were built elsewhere; see Engine.inject."""
        self._engine.check_length(len(token_ids))
        self._engine.pager.append(self.seq, list(token_ids))
        self._engine.inject(self.seq, cache)

    def park(self) -> None:
        """Out of the device tier and into the store; the session ends here and can be resumed, also by another process."""
        self._engine.pager.park(self.id, self.seq, self._extra())
        self._seq = None

    def checkpoint(self) -> None:
        """Remember the session as it is, so that it survives a crash, and go on. Raises as Pager.checkpoint does."""
        self._engine.pager.checkpoint(self.id, self.seq, self._extra())

    def _extra(self) -> dict[str, Any]:
        return {} if self._rng_state is None else {"rng_state": self._rng_state}

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the whole session to a new file that travels; see archive.py. Raises ConfigError."""
        about = {"session": self.id, "rng_state": None if self._rng_state is None else self._rng_state.hex()}
        export_sequence(self._engine.pager, self.seq, Path(path), about)

    @classmethod
    def load(cls, engine: Engine, path: str | os.PathLike[str], session_id: str, namespace: str) -> Session:
        """A new session with what `export` wrote. Raises as import_sequence does."""
        if engine.has_session(session_id):
            raise ConfigError(f"session {session_id!r} exists already; delete it first, or use another id")
        seq, about = import_sequence(engine.pager, Path(path), namespace)
        session = cls(engine, check_session_id(session_id), namespace, seq)
        session._rng_state = bytes.fromhex(about["rng_state"]) if about.get("rng_state") else None
        engine.add_session(session)
        return session

    def resume(self) -> Session:
        """Bring a parked session back; does nothing for a running one. Raises ConfigError after close()."""
        if self.is_parked:
            self._seq, parked = self._engine.pager.resume(self.id, self.namespace)
            self._rng_state = parked.extra.get("rng_state")
        assert self.seq >= 0
        return self

    def fork(self, n: int = 1) -> list[Session]:
        """n sessions over the same blocks, named <id>/1, <id>/2, ... where those are free; whoever writes first copies."""
        return [self._fork_as(name) for name, _ in zip(self._free_names(), range(n))]

    def _free_names(self) -> Iterator[str]:
        return (name for i in count(1) if not self._engine.has_session(name := f"{self.id}/{i}"))

    def _fork_as(self, name: str) -> Session:
        child = Session(self._engine, name, self.namespace, self._engine.pager.fork(self.seq))
        self._engine.add_session(child)
        return child

    def rollback(self, num_tokens: int) -> None:
        """Forget everything past the first num_tokens tokens."""
        self._engine.pager.truncate(self.seq, num_tokens)

    def close(self, *, released: bool = False) -> None:
        """End without parking; the blocks stay as cache, or with `released` (it is over for good) leave first."""
        if self._seq is not None:
            end = self._engine.pager.release if released else self._engine.pager.finish
            end(self._seq)
            self._seq = None
        self.is_open = False
        self._engine.drop_session(self)

    def encode(self, message: str | Sequence[int] | Sequence[Message]) -> list[int]:
        """The token ids to append for a message. Touches no step of the engine: any thread may do what takes a while."""
        is_text = isinstance(message, str)
        if not is_text and not any(isinstance(part, Mapping) for part in message):
            return [int(token) for token in message]  # type: ignore[arg-type]
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise ConfigError("send: text needs a tokenizer; pass token ids, or give the engine a tokenizer")
        messages = [{"role": "user", "content": message}] if is_text else message
        ends = end_tokens(self._engine.model, tokenizer)
        return render_messages(tokenizer, messages, self.token_ids, ends)  # type: ignore[arg-type]
