"""/v1/cache: warm prompts before they are asked, keep prefixes for a time, see what the tiers hold."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..engine import Engine
from ..sampling import SamplingParams
from .bodies import PinRequest, Prompts, WarmRequest
from .caller import namespace_of
from .errors import ApiError, bad, of_ours
from .generating import entered
from .pins import Pin
from .prompts import Kept, Prompt
from .replies import Deleted, PinList, PinReply, StatsReply, WarmedPrompt, WarmReply, errors
from .service import Asked, Service
from .streaming import DONE, EVENT_STREAM, KEEP_ALIVE, EventStream, event

PROGRESS_S = 0.5  # between two events of one prompt
_WARM = SamplingParams(max_tokens=0)


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/cache", tags=["cache"])

    @routes.post("/warm", response_model=WarmReply, responses=errors(400, 401, 413, 429, 503) | EVENT_STREAM)
    async def warm(body: WarmRequest, request: Request) -> Any:
        """Compute prompts that are not cached yet, one after the other. With `stream`, events say how far it is."""
        owner = namespace_of(request)
        with entered(service) as stay:
            prompts = await _prompts_of(service, body)
            warming = _Warming(service, owner, body.cache_salt, prompts)
            if not body.stream:
                async for _ in warming.steps(None):
                    pass
                return warming.reply()
            stay.keep()
            return _in_events(service, warming)

    @routes.post("/pins", responses=errors(400, 401, 413, 429, 503))
    async def pin(body: PinRequest, request: Request) -> PinList:
        """Compute prompts where needed and keep their whole blocks for ttl_s, in some tier."""
        owner = namespace_of(request)
        with entered(service):
            made = []
            for prompt in await _prompts_of(service, body):
                held = Prompt(prompt.token_ids, (Kept(len(prompt.token_ids), body.ttl_s),))
                asked = await _run(service, "pins", owner, body.cache_salt, held)
                if not asked.pins:
                    size = service.engine.pager.block_size
                    if len(prompt.token_ids) < size:
                        raise bad(f"prompts: one of {len(prompt.token_ids)} tokens fills no block of {size}", "prompts")
                    raise ApiError(
                        429, "no room for this pin; delete one, or wait", code="pins_full", retry_after_s=60.0
                    )
                made += asked.pins
            return PinList(data=[_reply(one, body.ttl_s) for one in made])

    @routes.get("/pins", responses=errors(401, 503))
    async def pins(request: Request) -> PinList:
        """This namespace's pins, those of cache_control among them."""
        owner = namespace_of(request)
        held = await service.on_engine(lambda engine: service.pins.of(owner))
        return PinList(data=[_reply(one, left_s) for one, left_s in held])

    @routes.delete("/pins/{pin_id}", responses=errors(400, 401, 404, 503))
    async def unpin(pin_id: str, request: Request) -> Deleted:
        owner = namespace_of(request)
        if not await service.on_engine(lambda engine: service.pins.let_go(pin_id, owner)):
            raise ApiError(404, f"pin {pin_id[:64]!r} is unknown; GET /v1/cache/pins lists yours", code="unknown_pin")
        return Deleted(id=pin_id)

    @routes.get("/stats", responses=errors(401, 503))
    async def stats(request: Request) -> StatsReply:
        """Levels and counters of the tiers."""
        namespace = namespace_of(request)
        return await service.on_engine(lambda engine: _stats(service, engine, namespace))

    return routes


class _Warming:
    """Prompts computed one after the other, and what became of them."""

    def __init__(self, service: Service, owner: str, salt: str | None, prompts: Sequence[Prompt]) -> None:
        self._service, self._owner, self._salt, self._prompts = service, owner, salt, prompts
        self.done: list[WarmedPrompt] = []
        self.now: Asked | None = None

    async def steps(self, look_s: float | None) -> AsyncIterator[dict[str, Any]]:
        """How far it is: after each prompt, and every look_s seconds."""
        for prompt in self._prompts:
            started_s = time.monotonic()
            asked = self.now = await self._service.generate("warm", self._owner, self._salt, [prompt], _WARM)
            async for delta in asked.answers.deltas(look_s):
                if delta is None:
                    yield await self._progress(asked)
            usage = self._service.usage(asked)
            cached = usage.prompt_tokens_details.cached_tokens
            self.done.append(
                WarmedPrompt(
                    tokens=usage.prompt_tokens,
                    cached_tokens=cached,
                    computed_tokens=usage.prompt_tokens - cached,
                    seconds=time.monotonic() - started_s,
                )
            )
            yield await self._progress(None)

    def reply(self) -> WarmReply:
        tokens, computed = sum(one.tokens for one in self.done), sum(one.computed_tokens for one in self.done)
        return WarmReply(prompts=self.done, tokens=tokens, computed_tokens=computed)

    def cancel(self) -> None:
        if self.now is not None:
            self.now.answers.cancel()

    async def _progress(self, asked: Asked | None) -> dict[str, Any]:
        tokens = sum(one.tokens for one in self.done)
        if asked is not None:
            tokens += await self._service.num_computed(asked)
        total = sum(len(prompt.token_ids) for prompt in self._prompts)
        return {
            "object": "cache.warm.progress",
            "prompts": len(self.done),
            "num_prompts": len(self._prompts),
            "tokens": tokens,
            "num_tokens": total,
        }


def _in_events(service: Service, warming: _Warming) -> Response:
    async def events() -> AsyncIterator[bytes]:
        try:
            yield KEEP_ALIVE
            async for progress in warming.steps(PROGRESS_S):
                yield event(progress)
            yield event(warming.reply().model_dump())
        except Exception as error:  # the headers have gone: whatever it is, it leaves as an event
            yield event(of_ours(error).body())
        yield DONE

    def on_end() -> None:
        warming.cancel()
        service.gate.leave()

    return EventStream(events(), on_end, warming.cancel)


async def _run(service: Service, endpoint: str, owner: str, salt: str | None, prompt: Prompt) -> Asked:
    asked = await service.generate(endpoint, owner, salt, [prompt], _WARM)
    async for _ in asked.answers.deltas():
        pass
    service.usage(asked)
    return asked


async def _prompts_of(service: Service, body: Prompts) -> list[Prompt]:
    if (body.prompts is None) == (body.messages is None) or not (body.prompts or body.messages):
        raise bad("give either prompts (texts or lists of token ids) or messages (one chat)", "prompts")
    if body.messages is not None:
        found = [await service.on_text_thread(service.reader.chat, body.messages)]
    else:
        found = [await service.on_text_thread(service.reader.completion, one) for one in body.prompts or ()]
    longest = max(len(prompt.token_ids) for prompt in found)
    if longest > service.max_context:
        raise bad(
            f"a prompt of {longest} tokens is more than the context of {service.max_context}; shorten it",
            code="context_length_exceeded",
        )
    return [Prompt(prompt.token_ids) for prompt in found]


def _reply(pin: Pin, left_s: float) -> PinReply:
    return PinReply(id=pin.id, tokens=pin.tokens, expires_in_s=left_s)


_TIER_FIELDS = ("capacity_bytes", "used_bytes", "blocks", "hit_tokens", "evicted_blocks", "bytes_in", "bytes_out")


def _stats(service: Service, engine: Engine, namespace: str) -> StatsReply:
    status = engine.pager.status()
    own = [one for one in engine.pager.sessions().values() if one["namespace"] == namespace]
    held = service.pins.of(namespace)
    return StatsReply(
        block_size=status["block_size"],
        tiers={name: {field: tier[field] for field in _TIER_FIELDS} for name, tier in status["tiers"].items()},
        miss_tokens=status["miss_tokens"],
        ghost_tokens=status["ghost_tokens"],
        transfers_in_flight=status["transfers_in_flight"],
        requests={"active": len(engine.scheduler.active), "waiting": len(engine.scheduler.waiting)},
        sessions=len(own),
        pins=len(held),
        pinned_tokens=sum(pin.tokens for pin, _ in held),
    )
