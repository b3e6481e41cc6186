"""Mixed traffic on one engine, all of it drawn from a seed: requests of every kind, sessions, cancellations, hints.

Copies happen in the seed's order and time passes as it says, so a seed repeats a run exactly; on a real CPU backend the
traffic is the same and the order is the machine's. Checked: every answer against what the model says by itself (oracle.py),
sessions against a list of tokens, and at the end that nothing is left behind.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.hf import discover, fingerprint
from kvtier.engine.request import Request
from kvtier.engine.session import Session
from kvtier.pager.pager import Pager
from kvtier.pager.tier_formats import device_layouts
from kvtier.tiers.errors import ConfigError, KvTierError

from .oracle import ROUNDING, Oracle
from .test_beam import cut, stock_beams
from .test_scheduler import check_end
from .traffic_world import BLOCK, Clock, Shape, SteppedBackend, model_of

BUDGET = 48  # tokens of a step
MOST_STEPS = 6000  # of the engine, once nobody comes any more: more would be for ever
MOST_AT_ONCE = 8
KINDS = {  # of requests, by how often they come
    "plain": 6, "sampled": 2, "several": 2, "beams": 4, "ngram": 3, "draft": 2, "window": 2, "select": 2, "nothing": 1,
}  # fmt: skip
PACKED_KINDS = {"plain": 4, "several": 2, "ngram": 3, "beams": 1, "nothing": 1}  # what a test can say of rounded pages
TALKS = {"send": 8, "fork": 2, "rollback": 2, "park": 3, "resume": 3, "checkpoint": 1, "close": 1}
PACKED_ROUNDING = 3.0  # nats that 8 bits move a logit of these models at the most, and far less than other tokens would


@dataclass
class Asked:
    """A request on its way, and what it was asked."""

    request: Request
    kind: str
    prompt: list[int]
    talk: Talk | None = None
    rounding: float | None = None  # None: only that it ends is known of the answer
    heard: dict[int, list[int]] = field(default_factory=dict)
    was_cancelled: bool = False
    stop_after: int | None = None


@dataclass
class Talk:
    """A session, and the plain list that it must be."""

    session: Session
    tokens: list[int] = field(default_factory=list)
    is_exact: bool = True
    is_busy: bool = False


class Traffic:
    """One seeded run. `backend`: who copies; None for one that follows the seed."""

    def __init__(self, seed: int, folder: Path, make_backend: Callable[[], Any] | None = None) -> None:
        self.seed, self.choose, self.clock = seed, random.Random(seed), Clock()
        self.shape = Shape.draw(self.choose, folder)
        self.oracle = Oracle(model_of(self.shape.family, 1))
        self.is_stepped = make_backend is None
        self._make_backend = make_backend or (lambda: SteppedBackend(self.choose.randrange(1 << 30), self.clock))
        self.draft = self._open(2, PagerConfig(1 << 22, 1 << 20, backend="cpu"), None)
        self.engine = self._open(0, PagerConfig(backend="cpu", **self.shape.settings), self.draft)
        self.bases = [self._tokens(200) for _ in range(3)]  # what prompts have in common
        self.asked: list[Asked] = []
        self.talks: dict[str, Talk] = {}
        self.forks: list[int] = []  # sequences forked before a first token
        self.num_names = 0
        self.ends: Counter[str] = Counter()

    @staticmethod
    def shape_of(seed: int, folder: Path) -> Shape:
        """What the seed draws, without running it."""
        return Shape.draw(random.Random(seed), folder)

    # ------------------------------------------------------------------ the engine
    def _open(self, number: int, config: PagerConfig, draft: Engine | None) -> Engine:
        """An engine whose copies and clock are ours."""
        model, is_packed = model_of(self.shape.family, number), config.device != "full"
        spec, streaming = discover(model), self.shape.streaming
        spec = spec if streaming is None else spec.streamed(streaming)
        layouts = device_layouts(config, spec.layouts(2 * BLOCK if is_packed else BLOCK))
        clock = dict(clock=self.clock) if self.is_stepped else {}
        pager = Pager.open(layouts, config, model_fingerprint=fingerprint(model), backend=self._make_backend(), **clock)
        engine = Engine(model, spec, pager, None, BUDGET, self.shape.limits, draft)
        if self.is_stepped:
            engine.scheduler.clock = self.clock
            engine.scheduler.ran = self._untimed(engine.scheduler.ran)  # type: ignore[method-assign]
        return engine

    def _untimed(self, ran: Callable[..., None]) -> Callable[..., None]:
        """Computing takes what the seed says: next to nothing, or longer than any copy."""
        return lambda work, seconds: ran(work, self.choose.choice([1e-9, 1e-5, 1e-3, 10.0]))

    def run(self, rounds: int = 60) -> Traffic:
        try:
            for _ in range(rounds):
                self._round()
            for _ in range(MOST_STEPS):
                if not self.asked:
                    break
                self._step()
            assert not self.asked, f"never ended: {[(a.kind, a.request.seq) for a in self.asked]}"
            if self._has_whole_store:
                self._restart()
            self._finish()
        finally:
            self._shut()
        return self

    def _round(self) -> None:
        """Something happens, or nothing; then a step."""
        draw = self.choose.random()
        if draw < 0.35 and len(self.asked) < MOST_AT_ONCE:
            self._ask()
        elif draw < 0.6:
            self._talk()
        elif draw < 0.66 and self.asked:
            self._cancel(self.choose.choice(self.asked))
        elif draw < 0.7 and self.asked:
            self._hint(self.choose.choice(self.asked).request)
        if self.is_stepped and self.choose.random() < self.shape.fails:
            self._backend.fail_next(self.choose.choice(["promote", "demote", "read", "write"]), OSError(5, "made up"))
        self._step()

    @property
    def _backend(self) -> Any:
        return self.engine.pager.backend

    def _step(self) -> None:
        if self.is_stepped:
            for _ in range(self.choose.choice([0, 0, 1, 5, 50])):
                self._backend.run_one()
            self.clock.now_s += self.choose.choice([0.0, 0.001, 0.02])
        if self.choose.random() < 0.5:
            self.engine.pager.poll()
        self.engine.step()
        if self.choose.random() < 0.05:
            self.engine.pager.check_integrity()
        for asked in [a for a in self.asked if all(r.is_done for r in (a.request, *a.request.twins))]:
            self.engine.settle_ended()
            self.asked.remove(asked)
            self._ended(asked)

    # ------------------------------------------------------------------ asking
    def _tokens(self, n: int) -> list[int]:
        return [self.choose.randrange(1, 512) for _ in range(n)]

    def _pick(self, weights: dict[str, int]) -> str:
        return self.choose.choices(list(weights), list(weights.values()))[0]

    def _prompt(self) -> list[int]:
        """A part of a text that others have too, and something of its own."""
        base = self.choose.choice(self.bases)[: self.choose.choice([0, 16, 40, 64, 97, 130])]
        own = self._tokens(self.choose.choice([1, 2, 9, 30]))
        prompt = base + own
        return (prompt * 3)[: len(prompt) + 20] if self.choose.random() < 0.3 else prompt

    def _params(self, kind: str) -> SamplingParams:
        choose, said = self.choose, dict(max_tokens=self.choose.choice([1, 2, 5, 12, 25]))
        if choose.random() < 0.3:
            said["stop_token_ids"] = tuple(self._tokens(40))
        if choose.random() < 0.2 and kind != "beams":
            said["logprobs"] = 2
        more: dict[str, dict[str, Any]] = {
            "sampled": dict(temperature=0.9, seed=choose.randrange(99), top_k=choose.choice([0, 20])),
            "several": dict(n=choose.randrange(2, 4), temperature=choose.choice([0.0, 0.8]), seed=choose.randrange(99)),
            "beams": dict(num_beams=choose.randrange(2, 5), n=choose.randrange(1, 3)),
            "ngram": dict(speculation="ngram", temperature=choose.choice([0.0, 0.0, 0.8]), seed=choose.randrange(99)),
            "draft": dict(speculation="model"),
            "window": dict(attention=f"window:{choose.choice([20, 48])},sinks={choose.choice([0, 4, 17])}"),
            "select": dict(attention=f"select:{choose.choice([3, 4, 99])}"),
            "nothing": dict(max_tokens=0),
        }
        return SamplingParams(**(said | more.get(kind, {})))

    def _ask(self) -> None:
        kind = self._pick(PACKED_KINDS if self.shape.is_packed else KINDS)
        if kind == "select" and not self.engine.pager.can_select:
            kind = "plain"
        prompt = self._prompt() if kind != "window" else self._tokens(self.choose.choice([5, 40, 100]))
        options: dict[str, Any] = dict(namespace=self.choose.choice(["default", "default", "other"]))
        options |= dict(priority=self.choose.choice([0, 0, 0, 1, 5]))
        if self.choose.random() < 0.1:
            options["deadline_s"] = self.engine.scheduler.clock() + self.choose.choice([0.0, 0.05, 1.0])
        try:
            request = self.engine.request(prompt, self._params(kind), **options)
        except ConfigError as error:
            assert "longer than all tiers" in str(error), error
            return
        self._go(Asked(request, kind, prompt, rounding=self._rounding(request.params)))
        if self.choose.random() < 0.1:
            request.on_prompt = lambda first: self.forks.append(self.engine.pager.fork(first.seq))
        if self.choose.random() < 0.1:
            request.is_last = True

    def _rounding(self, params: SamplingParams) -> float | None:
        """How far a greedy token may be from the best, or None where nothing is known of the answer."""
        attention = params.attention
        if attention is not None and attention.kind == "select" and attention.pages < 99:
            return None
        if attention is not None and attention.kind == "window" and self.shape.family != "llama":
            return None  # the oracle's mask would take the place of the model's own windows
        if self.shape.streaming is not None and (attention is not None or params.num_beams > 1):
            return None
        if self.shape.is_packed:
            return None if params.temperature or params.num_beams > 1 else PACKED_ROUNDING
        return ROUNDING

    def _go(self, asked: Asked) -> None:
        if self.choose.random() < 0.1 and asked.request.beams is None:
            asked.stop_after = self.choose.randrange(1, 6)
        for index, request in enumerate((asked.request, *asked.request.twins)):
            heard = asked.heard[index] = []

            def on_token(one: Request, token: int, heard: list[int] = heard) -> None:
                heard.append(token)
                if len(heard) == asked.stop_after:
                    one.stop()

            request.on_token = on_token
        self.asked.append(asked)
        self.engine.scheduler.add(asked.request)

    def _cancel(self, asked: Asked) -> None:
        asked.was_cancelled = True
        for request in (asked.request, *asked.request.twins):
            request.is_cancelled = True

    def _hint(self, request: Request) -> None:
        if request.seq >= 0:
            pager = self.engine.pager
            self.choose.choice([pager.prefetch, lambda seq: pager.pin(seq, 0.1), pager.bring_up])(request.seq)

    # ------------------------------------------------------------------ sessions
    def _talk(self) -> None:
        free = [name for name, talk in self.talks.items() if not talk.is_busy]
        if not free or (len(self.talks) < 5 and self.choose.random() < 0.3):
            self.num_names += 1
            name = f"s{self.num_names}"
            self.talks[name] = Talk(self.engine.session(name))
        else:
            name = self.choose.choice(free)
        verb = self._pick(TALKS)
        getattr(self, f"_{verb}")(name, self.talks[name])

    def _send(self, name: str, talk: Talk) -> None:
        if talk.session.is_parked:
            self._resume(name, talk)
        kind = self.choose.choice(["plain", "plain", "ngram", "sampled", "select"])
        kind = "plain" if kind == "select" and not self.engine.pager.can_select else kind
        kind = "plain" if kind == "sampled" and self.shape.is_packed else kind
        params, message = self._params(kind), self._tokens(self.choose.choice([1, 3, 20, 70]))
        try:
            request = talk.session.turn(message, params)
        except ConfigError as error:
            assert "longer than all tiers" in str(error), error
            self._close(name, talk)
            return
        talk.is_busy, rounding = True, self._rounding(params)
        if params.attention is not None:  # its K/V are branched: what follows has seen what it has seen
            talk.is_exact &= rounding is not None
        self._go(Asked(request, kind, [*talk.tokens, *message], talk, rounding if talk.is_exact else None))

    def _fork(self, name: str, talk: Talk) -> None:
        if talk.session.is_parked or len(self.talks) > 6:
            return
        for child in talk.session.fork(self.choose.randrange(1, 3)):
            self.talks[child.id] = Talk(child, list(talk.tokens), talk.is_exact)

    def _rollback(self, name: str, talk: Talk) -> None:
        if not talk.session.is_parked:
            keep = self.choose.randrange(len(talk.tokens) + 1)
            talk.session.rollback(keep)
            del talk.tokens[keep:]

    def _park(self, name: str, talk: Talk) -> None:
        if talk.session.is_parked or not talk.tokens:
            return
        try:
            talk.session.park()
        except KvTierError as error:
            self._may_be_full(error)
            assert talk.session.token_ids == talk.tokens

    def _checkpoint(self, name: str, talk: Talk) -> None:
        if talk.session.is_parked or not talk.tokens:
            return
        try:
            talk.session.checkpoint()
        except KvTierError as error:
            self._may_be_full(error)

    def _resume(self, name: str, talk: Talk) -> None:
        talk.session.resume()
        assert talk.session.token_ids == talk.tokens, f"session {name} came back with other tokens"

    def _close(self, name: str, talk: Talk) -> None:
        talk.session.resume().close(released=self.choose.random() < 0.3)
        if name in self.engine.pager.sessions():
            self.engine.pager.forget(name)
        del self.talks[name]

    # ------------------------------------------------------------------ what came out
    def _ended(self, asked: Asked) -> None:
        for index, request in enumerate((asked.request, *asked.request.twins)):
            self.ends[f"{asked.kind} {request.output.finish_reason}"] += 1
            self._check_end(asked, index, request)
        if asked.request.beams is not None:
            self._check_beams(asked)
        self.engine.drop(asked.request)
        if asked.talk is not None:
            self._take(asked, asked.talk)

    def _check_end(self, asked: Asked, index: int, request: Request) -> None:
        out, params = request.output, request.params
        if out.finish_reason == "error":
            assert request.error is not None
            self._may_be_full(request.error)
        elif out.finish_reason == "cancelled":
            assert asked.was_cancelled
        elif out.finish_reason == "deadline":
            assert asked.request.deadline_s is not None
        elif out.finish_reason == "length":
            assert len(out.token_ids) == params.max_tokens, (len(out.token_ids), params.max_tokens)
        else:
            assert len(out.token_ids) == asked.stop_after or out.token_ids[-1] in params.stop_token_ids
        assert asked.heard[index] == out.token_ids, (asked.heard[index], out.token_ids)
        assert out.usage.cached_tokens == out.usage.device_tokens + out.usage.host_tokens + out.usage.disk_tokens
        assert params.logprobs is None or [entry.token for entry in out.logprobs] == out.token_ids
        if asked.rounding is not None and request.beams is None:
            attention = params.attention
            window = attention if attention and attention.kind == "window" else self.shape.streaming
            seen = dict(window=window.window, sinks=window.sinks) if window else {}
            self.oracle.check(asked.prompt, out.token_ids, params, index, **seen, rounding=asked.rounding)

    def _check_beams(self, asked: Asked) -> None:
        """All of the outputs, in order, are those of transformers; two of one score may change places."""
        first, params = asked.request, asked.request.params
        if asked.rounding is None or first.output.finish_reason not in ("stop", "length"):
            return
        stop = params.stop_token_ids
        stops = list(stop) or None
        wanted = stock_beams(self.oracle.model, asked.prompt, params.num_beams, params.n, params.max_tokens, stops)
        for request, tokens in zip((first, *first.twins), wanted, strict=True):
            found, tokens = request.output.token_ids, cut(tokens, stop)
            if found != tokens:
                scores = [self.oracle.score(asked.prompt, said) for said in (found, tokens)]
                assert abs(scores[0] - scores[1]) < ROUNDING, f"beams say {found}, not {tokens}: {scores}"

    def _take(self, asked: Asked, talk: Talk) -> None:
        """A turn that came to its end is part of the session; any other never was."""
        talk.is_busy = False
        if asked.request.output.finish_reason in ("length", "stop"):
            talk.session.took(asked.request)
            talk.tokens = [*asked.prompt, *asked.request.output.token_ids]
        else:
            talk.session.undo()
        assert talk.session.token_ids == talk.tokens

    def _may_be_full(self, error: BaseException) -> None:
        """An error that these tiers may give: sessions hold all of a small one, or copies are made to fail."""
        is_small = "nvme_path" not in self.shape.settings
        assert isinstance(error, KvTierError) and (is_small or self.shape.fails), repr(error)
        self.ends[f"refused {type(error).__name__}"] += 1

    @property
    def _has_whole_store(self) -> bool:
        return "nvme_path" in self.shape.settings and not self.shape.fails

    def _restart(self) -> None:
        """Another process over the same store goes on with what was parked."""
        for name, talk in list(self.talks.items()):
            if not talk.tokens:
                self._close(name, talk)
            elif not talk.session.is_parked:
                talk.session.park()
        for seq in self.forks:
            self.engine.pager.finish(seq)
        self.forks.clear()
        self.engine.pager.check_integrity()
        assert not self.engine.pager._core.sequences
        self.engine.close()
        self.engine = self._open(0, PagerConfig(backend="cpu", **self.shape.settings), self.draft)
        for name, talk in list(self.talks.items()):
            talk.session = self.engine.session(name)
            assert talk.session.token_ids == talk.tokens
            self._send(name, talk)
        for _ in range(MOST_STEPS):
            if not self.asked:
                return
            self._step()
        raise AssertionError("never ended after a restart")

    def _finish(self) -> None:
        """Everybody goes, and nothing is left."""
        for name, talk in list(self.talks.items()):
            self._close(name, talk)
        for seq in self.forks:
            self.engine.pager.finish(seq)
        for engine in (self.engine, self.draft):
            check_end(engine)

    def _shut(self) -> None:
        self.engine.close()
        self.draft.close()
