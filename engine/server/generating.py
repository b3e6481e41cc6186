"""/v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...pager.keys import salted
from .bodies import MAX_PROMPTS, ChatRequest, CompletionRequest, Sampling
from .caller import namespace_of
from .errors import bad
from .prompts import Prompt
from .replies import ChatReply, CompletionReply, ModelList, ModelReply, errors
from .service import Asked, Service
from .streaming import EVENT_STREAM, answer_in_events, answer_whole
from .wire import ChatWire, CompletionWire, Wire

_ERRORS = errors(400, 401, 404, 413, 429, 503)


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["generating"])

    @routes.post("/v1/chat/completions", response_model=ChatReply, responses=_ERRORS | EVENT_STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat. Usage says how much of the prompt was cached, and in which tier."""
        service.check_model(body.model)
        with entered(service) as stay:
            prompt = await service.on_text_thread(service.reader.chat, body.messages, body.prompt_cache_options)
            wire = chat_wire(service, body)
            asked = await _generate(service, "chat", body, request, [prompt])
            return await answer(service, request, asked, wire, body, stay)

    @routes.post("/v1/completions", response_model=CompletionReply, responses=_ERRORS | EVENT_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts, given as text or token ids."""
        service.check_model(body.model)
        with entered(service) as stay:
            prompts = [await service.on_text_thread(service.reader.completion, one) for one in _prompts_of(body)]
            if len(prompts) * (body.n or 1) > MAX_PROMPTS:
                raise bad(f"prompt: at most {MAX_PROMPTS} outputs (prompts times n) at a time; send fewer", "prompt")
            wire = CompletionWire(service.settings.model_name, int(time.time()), service.token_bytes, body.logprobs)
            asked = await _generate(service, "completions", body, request, prompts)
            return await answer(service, request, asked, wire, body, stay)

    @routes.get("/v1/models", responses=errors(401))
    async def models() -> ModelList:
        return ModelList(data=[_model(service)])

    @routes.get("/v1/models/{model_id:path}", responses=errors(401, 404))
    async def model(model_id: str) -> ModelReply:
        service.check_model(model_id)
        return _model(service)

    return routes


class entered:
    """Inside the gate until the block ends, or until somebody else leaves it: `keep`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_kept = False

    def __enter__(self) -> entered:
        self._service.gate.enter()
        return self

    def keep(self) -> None:
        self._is_kept = True

    def __exit__(self, *_: object) -> None:
        if not self._is_kept:
            self._service.gate.leave()


def chat_wire(service: Service, body: ChatRequest) -> ChatWire:
    return ChatWire(service.settings.model_name, int(time.time()), service.token_bytes, bool(body.logprobs))


async def answer(
    service: Service, request: Request, asked: Asked, wire: Wire, body: Sampling, stay: entered
) -> Response:
    if not body.stream:
        return await answer_whole(service, request, asked, wire)
    stay.keep()
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return answer_in_events(service, asked, wire, wants_usage)


async def _generate(
    service: Service, endpoint: str, body: Sampling, request: Request, prompts: Sequence[Prompt]
) -> Asked:
    params = [service.params(body, len(prompt.token_ids)) for prompt in prompts]
    owner = namespace_of(request)
    asked = await service.generate(
        endpoint,
        owner,
        body.cache_salt,
        [service.kept_of(body, prompt) for prompt in prompts],
        min(params, key=lambda one: one.max_tokens),
        stops=body.stops,
        is_continued=endpoint == "completions",
        urgency=service.urgency(body),
    )
    if endpoint == "chat":
        namespace = owner if body.cache_salt is None else salted(owner, body.cache_salt)
        asked.history_key = body.prompt_cache_key
        asked.reuse_break = service.histories.compare(namespace, body.prompt_cache_key, prompts[0].token_ids)
    return asked


def _prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad("prompt: it is empty; a prompt needs at least one token", "prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)  # type: ignore[list-item]


def _model(service: Service) -> ModelReply:
    return ModelReply(id=service.settings.model_name, created=service.created_s, max_context=service.max_context)
