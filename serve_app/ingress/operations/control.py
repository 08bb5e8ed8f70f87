"""Calls that change or ask every engine replica: health, sleep, abort."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from serve_app.deployments.rollout.sleeping import SleepTag
from serve_app.errors import EngineUnavailable, InvalidRequest
from serve_app.ingress.edge.edge import ABORT_TIMEOUT_S
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import documented, failure
from serve_app.sessions import session_name
from serve_app.types import SleepLevel

router = APIRouter()
_DONE: dict[int | str, dict[str, Any]] = {200: {"description": "Done everywhere.", "content": {}}}


class Health(BaseModel):
    """LMDeploy's health answer: ``healthy`` or ``sleeping``."""

    status: str
    message: str = ""


class Sleeping(BaseModel):
    """Whether requests are refused until ``/wakeup``."""

    is_sleeping: bool


class AbortBody(BaseModel):
    """What to abort: all, or one session's request."""

    abort_all: bool = False
    session_id: Annotated[int, Field(ge=-1, lt=2**63)] | None = -1
    finished_reason: dict[str, Any] | None = None
    abort_message: str | None = None


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "r3serve"
    root: str | None = None
    parent: str | None = None
    permission: list[dict[str, Any]] = []


class ModelList(BaseModel):
    """All models."""

    object: str = "list"
    data: list[ModelCard]


@router.get("/health", response_model=Health, responses=documented())
async def health(edge: Edge) -> Any:
    """Answer 200 when an engine replica serves or sleeps, 503 otherwise."""
    try:
        sleeping = await edge.is_sleeping()
    except EngineUnavailable as error:
        return failure(503, f"unhealthy: {error}")
    return Health(status="sleeping" if sleeping else "healthy")


@router.get("/v1/models", response_model=ModelList, responses=documented())
async def models(edge: Edge) -> ModelList:
    """Name the served model."""
    name = edge.model_names[0]
    return ModelList(data=[ModelCard(id=name, root=name)])


@router.get("/is_sleeping", response_model=Sleeping, responses=documented())
async def is_sleeping(edge: Edge) -> Sleeping:
    """Tell whether some replica sleeps."""
    return Sleeping(is_sleeping=await edge.is_sleeping())


@router.post("/sleep", response_class=Response, responses=_DONE | documented())
async def sleep(edge: Edge, level: Annotated[int, Query(ge=1, le=2)] = 1) -> Response:
    """Abort what runs and free the weights' device memory, everywhere; level 2 forgets them."""
    depth: SleepLevel = 2 if level == 2 else 1
    await edge.everywhere("sleep", depth)
    return Response()


@router.post("/wakeup", response_class=Response, responses=_DONE | documented())
async def wakeup(
    edge: Edge, tags: Annotated[list[SleepTag] | None, Query(max_length=16)] = None
) -> Response:
    """Wake everything, or parts; requests are refused until all are awake."""
    await edge.everywhere("wake", tuple(tags or ()))
    return Response()


@router.post("/abort_request", response_class=Response, responses=_DONE | documented())
async def abort_request(body: AbortBody, edge: Edge) -> Response:
    """Abort all that runs, or one session's request, wherever it runs."""
    if body.abort_all:
        await edge.everywhere("abort", None, within_s=ABORT_TIMEOUT_S)
        return Response()
    if body.session_id is None or body.session_id < 0:
        raise InvalidRequest("expected abort_all, or the session_id of a request")
    name = session_name(body.session_id)
    if not sum(await edge.everywhere("abort", name, within_s=ABORT_TIMEOUT_S)):
        raise InvalidRequest(f"Session {body.session_id} not found.")
    return Response()


@router.get("/terminate", response_class=Response, responses=_DONE | documented())
async def terminate(edge: Edge) -> Response:
    """Abort all that runs. LMDeploy's server would end itself; this one is Serve's to end."""
    await edge.everywhere("abort", None, within_s=ABORT_TIMEOUT_S)
    return Response()
