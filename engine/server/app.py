"""The application: routes, guard and error bodies over one Service, and what OpenAPI says of them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from . import cache, errors, generating, health, sessions
from .gate import Guard
from .service import Service


def make_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="kvtier",
        version=version("kvtier"),
        description="OpenAI's chat and text completions over a tiered KV cache, with sessions and cache control.",
        docs_url=None,
        redoc_url=None,
    )
    routers = [module.router(service) for module in (generating, sessions, cache, health)]
    for one in routers:
        app.include_router(one)
    errors.install(app, [route for one in routers for route in one.routes])
    app.add_middleware(Guard, settings=service.settings, gate=service.gate)
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        schema = describe()
        _without_422(schema)
        if service.settings.api_keys:
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _without_422(schema: dict[str, Any]) -> None:
    """What is invalid is a 400 here, in our own body."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if "requestBody" in operation or operation.get("parameters"):
                operation["responses"].setdefault(
                    "400",
                    {
                        "description": "Bad Request",
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
                    },
                )
    for name in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(name, None)
