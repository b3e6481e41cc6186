"""/health, /ready, /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from .errors import ApiError
from .metrics import CONTENT_TYPE
from .replies import Health, errors
from .service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/health")
    async def health() -> Health:
        """The process answers."""
        return Health(status="alive")

    @routes.get("/ready", responses=errors(503))
    async def ready() -> Health:
        """Requests are taken: the engine runs and the server is not ending."""
        if not service.is_ready:
            why = "the server is ending" if service.gate.is_draining else "the engine has ended; see the log, restart"
            raise ApiError(503, why, code="not_ready", retry_after_s=5.0)
        return Health(status="ready")

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **errors(401)})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return routes
