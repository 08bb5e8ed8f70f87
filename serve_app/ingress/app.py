"""The HTTP edge: what goes in and out is LMDeploy's and OpenAI's, what happens is the graph's."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app.ingress.dialects import chat, completions, generate
from serve_app.ingress.edge.edge import PATHS, Ingress
from serve_app.ingress.guard.errors import handle_errors
from serve_app.ingress.guard.gate import Gate
from serve_app.ingress.openapi import describe
from serve_app.ingress.operations import control, routed_experts, weights

_ROUTERS = (control, generate, chat, completions, weights, routed_experts)


def make_http(locate: Callable[[], Ingress]) -> FastAPI:
    """Return the application; ``locate`` finds the replica whenever a request comes."""
    app = FastAPI(title="r3serve", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.locate = locate
    for module in _ROUTERS:
        app.include_router(module.router)
    app.add_middleware(Gate, keeper=lambda: locate().keeper)
    handle_errors(app)
    describe(app)
    assert set(app.openapi()["paths"]) | {"/openapi.json"} == set(PATHS)
    return app


def http() -> FastAPI:
    """Return the application of the replica that calls this."""
    return make_http(_this_replica)


def _this_replica() -> Any:
    return serve.get_replica_context().servable_object
