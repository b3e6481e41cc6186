"""Who asks: what the guard found out about a request."""

from __future__ import annotations

from fastapi import Request


def namespace_of(request: Request) -> str:
    """The namespace of the key that came with it."""
    return str(request.scope["state"]["namespace"])
