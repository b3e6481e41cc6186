"""/v1/sessions: conversations that the server keeps as token ids, parked when idle, durable after every turn.

A session's id is the client's own; inside it carries the namespace, so nobody can see, take or guess another's. A fork
of `a` is `a~1`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...tiers.errors import UnknownSessionError
from ..conversations import ConversationInfo
from .answers import Answers
from .bodies import ChatRequest, ForkRequest, RollbackRequest, SessionRequest
from .caller import namespace_of
from .errors import ApiError, bad
from .generating import answer, chat_wire, entered
from .prompts import Prompt, first_mark, plain_messages
from .replies import ChatReply, Deleted, SessionList, SessionReply, errors
from .service import Asked, Service, given_limit
from .settings import DEFAULT_NAMESPACE
from .streaming import EVENT_STREAM
from .text import TextStream

T = TypeVar("T")
_KNOWN_ID = re.compile(r"[A-Za-z0-9_.~-]{1,200}")
_VERB = errors(400, 401, 404, 409, 429, 503)


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/sessions", tags=["sessions"])
    conversations = service.conversations

    async def verb(request: Request, session_id: str, run: Callable[[str, str], T]) -> T:
        """Run something that may wait for a disk, with the session's inner id and namespace."""
        namespace = namespace_of(request)
        with entered(service):
            return await service.on_waiting_thread(lambda: run(_inner(namespace, session_id), namespace))

    @routes.post("", responses=errors(400, 401, 409, 429, 503))
    async def create(body: SessionRequest, request: Request) -> SessionReply:
        """A new, empty session."""
        name = body.id if body.id is not None else secrets.token_hex(12)

        def make(inner: str, namespace: str) -> ConversationInfo:
            _check_room(service, namespace)
            return conversations.create(inner, namespace=namespace)

        return _reply(await verb(request, name, make))

    @routes.get("", responses=errors(401, 503))
    async def list_sessions(request: Request) -> SessionList:
        """Every session of this key's namespace."""
        namespace = namespace_of(request)
        found = await service.on_waiting_thread(lambda: conversations.list_sessions(namespace))
        return SessionList(data=[_reply(one) for one in found if _KNOWN_ID.fullmatch(_outer(one))])

    @routes.get("/{session_id}", responses=errors(400, 401, 404, 503))
    async def get(session_id: str, request: Request) -> SessionReply:
        return _reply(await verb(request, session_id, lambda inner, ns: conversations.info(inner, namespace=ns)))

    @routes.delete("/{session_id}", responses=_VERB)
    async def delete(session_id: str, request: Request) -> Deleted:
        """Forget the session; its own blocks are the first to leave every tier."""
        await verb(request, session_id, lambda inner, ns: conversations.delete(inner, namespace=ns))
        return Deleted(id=session_id)

    @routes.post("/{session_id}/park", responses=_VERB)
    async def park(session_id: str, request: Request) -> SessionReply:
        """Out of the device tier, into the store."""
        return _reply(await verb(request, session_id, lambda inner, ns: conversations.park(inner, namespace=ns)))

    @routes.post("/{session_id}/resume", responses=_VERB)
    async def resume(session_id: str, request: Request) -> SessionReply:
        """Start to bring a parked session up before its next turn."""
        return _reply(await verb(request, session_id, lambda inner, ns: conversations.resume(inner, namespace=ns)))

    @routes.post("/{session_id}/fork", responses=_VERB)
    async def fork(session_id: str, body: ForkRequest, request: Request) -> SessionList:
        """n sessions that go on from here, over the same blocks."""

        def make(inner: str, namespace: str) -> list[ConversationInfo]:
            _check_room(service, namespace)
            return conversations.fork(inner, body.n, namespace=namespace)

        made = await verb(request, session_id, make)
        return SessionList(data=[_reply(one) for one in made])

    @routes.post("/{session_id}/rollback", responses=_VERB)
    async def rollback(session_id: str, body: RollbackRequest, request: Request) -> SessionReply:
        """Forget everything past the first num_tokens tokens."""
        done = await verb(
            request, session_id, lambda inner, ns: conversations.rollback(inner, body.num_tokens, namespace=ns)
        )
        return _reply(done)

    @routes.post("/{session_id}/messages", response_model=ChatReply, responses=_VERB | errors(413) | EVENT_STREAM)
    async def messages(session_id: str, body: ChatRequest, request: Request) -> Response:
        """A turn: a chat completion with only the new messages. It is durable when its answer has ended."""
        service.check_model(body.model)
        _check_turn(body)
        with entered(service) as stay:
            asked = await _turn(service, session_id, body, namespace_of(request))
            return await answer(service, request, asked, chat_wire(service, body), body, stay)

    return routes


def _check_room(service: Service, namespace: str) -> None:
    """Raises: ApiError when the namespace has all the sessions that it may have."""
    limit = service.settings.max_sessions
    if len(service.conversations.list_sessions(namespace)) >= limit:
        raise ApiError(
            429,
            f"this namespace has {limit} sessions, as many as it may; DELETE some that are over",
            code="too_many_sessions",
            retry_after_s=60.0,
        )


def _check_turn(body: ChatRequest) -> None:
    """Raises: ApiError for what a chat may ask for and a turn may not."""
    if body.cache_salt is not None or (body.n or 1) > 1:
        raise bad("a session has one answer per turn and its own blocks; leave n and cache_salt out, or fork it", "n")
    if body.end_of_session:
        raise bad("a session ends with DELETE /v1/sessions/{session_id}; leave end_of_session out", "end_of_session")
    keeping = "prompt_cache_retention" if body.prompt_cache_retention == "24h" else first_mark(body.messages)
    if keeping is not None:
        raise bad(
            f"a session's blocks are kept with it; leave {keeping} out, or keep a text with POST /v1/cache/pins",
            keeping,
        )


async def _turn(service: Service, session_id: str, body: ChatRequest, namespace: str) -> Asked:
    inner = _inner(namespace, session_id)
    prompt = await service.on_text_thread(service.reader.chat, body.messages)
    info = await service.on_waiting_thread(lambda: service.conversations.info(inner, namespace=namespace))
    params = service.params(body, len(prompt.token_ids), known_tokens=info.tokens)
    answers = Answers([TextStream(service.tokenizer, body.stops, frozenset(service.ends))])
    urgency = service.urgency(body)
    asked = Asked("sessions", namespace, namespace, params, [Prompt(prompt.token_ids)], answers, urgency)
    listener, plain = answers.listener(0), plain_messages(body.messages)
    try:
        await service.submit_turn(
            answers,
            lambda: service.conversations.send(
                inner,
                plain,
                params,
                listener,
                namespace=namespace,
                max_context=service.max_context,
                is_limit_open=given_limit(body) is None,
                priority=urgency.priority,
                timeout_s=urgency.timeout_s,
            ),
        )
    except BaseException:
        answers.cancel()
        raise
    return asked


def _inner(namespace: str, session_id: str) -> str:
    """The id that the engine knows. Raises: UnknownSessionError for one that no session can have."""
    if not _KNOWN_ID.fullmatch(session_id):
        raise UnknownSessionError(f"session {session_id[:64]!r} is unknown: it is no id of a session")
    name = session_id.replace("~", "/")
    return name if namespace == DEFAULT_NAMESPACE else f"{namespace}:{name}"


def _outer(info: ConversationInfo) -> str:
    return info.id.removeprefix(f"{info.namespace}:").replace("/", "~")


def _reply(info: ConversationInfo) -> SessionReply:
    return SessionReply(
        id=_outer(info),
        tokens=info.tokens,
        computed_tokens=info.computed_tokens,
        state=info.state,
        is_durable=info.is_durable,
        last_used=info.last_used_s,
    )
