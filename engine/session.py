"""Session: one conversation, kept as token ids, in a sequence while it runs and in the store while it is parked.

The last sampled token of a turn is known but not computed: the next turn computes it with the new tokens. So nothing is
computed twice, and a resumed session goes on exactly as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..tiers.errors import ConfigError
from .sampling import Output, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine


class Session:
    """Open with `engine.session(session_id)`."""

    def __init__(self, engine: Engine, session_id: str, namespace: str, seq: int | None) -> None:
        self.id, self.namespace = session_id, namespace
        self._engine = engine
        self._seq = seq

    @classmethod
    def open(cls, engine: Engine, session_id: str, namespace: str) -> Session:
        if session_id in engine.pager.sessions():
            session = cls(engine, session_id, namespace, None)
            session.resume()
            return session
        return cls(engine, session_id, namespace, engine.pager.begin(namespace))

    @property
    def seq(self) -> int:
        """The pager's sequence. Raises ConfigError while the session is parked."""
        if self._seq is None:
            raise ConfigError(f"session {self.id!r} is parked; call resume() first")
        return self._seq

    @property
    def is_parked(self) -> bool:
        return self._seq is None

    @property
    def token_ids(self) -> list[int]:
        return self._engine.pager.token_ids(self.seq)

    @property
    def num_computed(self) -> int:
        return self._engine.pager.num_computed(self.seq)

    def send(
        self,
        message: str | Sequence[int],
        params: SamplingParams | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Output:
        """Append a message (text needs a tokenizer) and generate. With max_tokens=0 only the cache is warmed."""
        params = params or SamplingParams()
        if params.n != 1:
            raise ConfigError("n: a session answers once per turn; fork it for more")
        new = self._encode(message)
        engine = self._engine
        known = engine.pager.token_ids(self.seq)
        engine.check_length(len(known) + len(new) + params.max_tokens)
        if not new and engine.pager.num_computed(self.seq) == len(known):
            raise ConfigError("send: the message is empty, there is nothing to compute")
        if not known and len(new) > 1:
            engine.pager.attach(self.seq, new[:-1])
            engine.pager.append(self.seq, new[engine.pager.num_computed(self.seq) :])
        else:
            engine.pager.append(self.seq, new)
        request = engine.continue_request(self.seq, len(new), params)
        engine.run([request], None if on_token is None else (lambda _, token: on_token(token)))
        if engine.tokenizer is not None:
            request.output.text = engine.tokenizer.decode(request.output.token_ids)
        return request.output

    def inject(self, token_ids: Sequence[int], cache: Any) -> None:
        """Fill an empty session with tokens whose K/V were built elsewhere; see Engine.inject."""
        self._engine.check_length(len(token_ids))
        self._engine.pager.append(self.seq, list(token_ids))
        self._engine.inject(self.seq, cache)

    def park(self) -> None:
        """Out of the device tier and into the store; the session ends here and can be resumed, also by another process."""
        self._engine.pager.park(self.id, self.seq)
        self._seq = None

    def resume(self) -> Session:
        """Bring a parked session back."""
        if self._seq is None:
            self._seq, _ = self._engine.pager.resume(self.id, self.namespace)
        return self

    def fork(self, n: int = 1) -> list[Session]:
        """n sessions over the same blocks, named <id>/1, <id>/2, ...; a block is copied when one of them writes to it."""
        return [
            Session(self._engine, f"{self.id}/{i + 1}", self.namespace, self._engine.pager.fork(self.seq))
            for i in range(n)
        ]

    def rollback(self, num_tokens: int) -> None:
        """Forget everything past the first num_tokens tokens."""
        self._engine.pager.truncate(self.seq, num_tokens)

    def close(self) -> None:
        """End without parking; the blocks stay as cache."""
        if self._seq is not None:
            self._engine.pager.finish(self._seq)
            self._seq = None

    def _encode(self, message: str | Sequence[int]) -> list[int]:
        if not isinstance(message, str):
            return [int(token) for token in message]
        if self._engine.tokenizer is None:
            raise ConfigError("send: text needs a tokenizer; pass token ids, or give the engine a tokenizer")
        ids = self._engine.tokenizer(message, add_special_tokens=not self._engine.pager.token_ids(self.seq))[
            "input_ids"
        ]
        return [int(token) for token in ids]
