"""New weights for every engine replica, in LMDeploy's words."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from serve_app.errors import InvalidRequest
from serve_app.ingress.edge.edge import Ingress
from serve_app.ingress.edge.replica import Edge
from serve_app.ingress.guard.errors import Forbidden, documented
from serve_app.weights.parts import BroadcastPart, GroupSpec, PickledPart

router = APIRouter()
_JOIN_SHARE = 0.4  # torch tries twice

LoadFormat = Literal["flattened_bucket"]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Dimension = Annotated[int, Field(ge=0, lt=2**31)]


class PickledWeights(BaseModel):
    """A part of new weights, pickled and in base64; ``finished`` with the last."""

    serialized_named_tensors: str | list[str] | None = None
    load_format: LoadFormat | None = None
    finished: bool = False


class WeightsGroup(BaseModel):
    """The process group that the trainer is about to open."""

    master_address: Annotated[str, Field(min_length=1, max_length=255)]
    master_port: Annotated[int, Field(ge=1, lt=2**16)]
    rank_offset: Annotated[int, Field(ge=1, lt=2**20)]
    world_size: Annotated[int, Field(ge=2, lt=2**20)]
    group_name: Name
    backend: Literal["nccl", "gloo"] = "nccl"


class GroupName(BaseModel):
    """A process group."""

    group_name: Name


class BroadcastWeights(GroupName):
    """What the trainer broadcasts next; ``finished`` with the last."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Dimension]]
    load_format: LoadFormat | None = None
    finished: bool = False


class Outcome(BaseModel):
    """Whether every replica did it."""

    success: bool
    message: str


@router.post("/update_weights", response_model=None, responses=documented())
async def update_weights(body: PickledWeights, edge: Edge) -> None:
    """Take weights that are unpickled in every replica: only where ``allow_pickle`` is on."""
    if not edge.args.allow_pickle:
        raise Forbidden(
            "unpickling runs the sender's code: allow_pickle is off in this server's configuration"
        )
    data = body.serialized_named_tensors
    gpus = edge.engine_args.group.gpus
    if isinstance(data, list) and len(data) not in {1, gpus}:
        raise InvalidRequest(
            f"serialized_named_tensors: expected one part"
            f"{f', or one for each of the {gpus} GPUs of a replica' if gpus > 1 else ''}, got"
            f" {len(data)}"
        )
    if data:
        await edge.everywhere("add_weights", PickledPart(data, body.load_format))
    if body.finished:
        await _commit(edge)


@router.post("/init_weights_update_group", response_model=Outcome, responses=documented())
async def init_weights_update_group(body: WeightsGroup, edge: Edge) -> Outcome:
    """Let every replica join the trainer's process group; answers when all ranks are there.

    Its ranks are fixed when it opens, so the number of replicas has to be, too.
    """
    scale = edge.engine_args.serve
    if scale.min_replicas != scale.max_replicas:
        raise InvalidRequest(
            "a process group needs a fixed number of replicas: expected engine.serve with"
            f" min_replicas equal to max_replicas, got {scale.min_replicas} and"
            f" {scale.max_replicas}; set both in the graph's configuration"
        )
    names = sorted(name for name, _ in await edge.everywhere("weight_version"))
    gpus = edge.engine_args.group.gpus
    last = body.rank_offset + len(names) * gpus
    if last > body.world_size:
        raise InvalidRequest(
            f"{len(names)} replicas{f' of {gpus} GPUs' if gpus > 1 else ''} from rank"
            f" {body.rank_offset} on need a world_size of at least {last}, got {body.world_size}"
        )
    spec = GroupSpec(
        body.master_address,
        body.master_port,
        body.rank_offset,
        body.world_size,
        body.group_name,
        body.backend,
    )
    # Less than the call may take, so that a trainer that does not come is told by its name.
    timeout_s = _JOIN_SHARE * edge.args.control_timeout_s
    await edge.everywhere("join_weights_group", spec, names, timeout_s)
    return Outcome(success=True, message=f"{len(names)} replicas joined {body.group_name!r}")


@router.post("/update_weights_from_distributed", response_model=Outcome, responses=documented())
async def update_weights_from_distributed(body: BroadcastWeights, edge: Edge) -> Outcome:
    """Let every replica take what the trainer broadcasts."""
    part = BroadcastPart(body.group_name, body.names, body.dtypes, body.shapes, body.load_format)
    if body.names:
        await edge.everywhere("add_weights", part)
    if not body.finished:
        return Outcome(success=True, message=f"{len(body.names)} tensors received")
    return Outcome(success=True, message=f"weights of version {await _commit(edge)} are served")


@router.post("/destroy_weights_update_group", response_model=Outcome, responses=documented())
async def destroy_weights_update_group(body: GroupName, edge: Edge) -> Outcome:
    """Let every replica leave the process group."""
    await edge.everywhere("leave_weights_group", body.group_name)
    return Outcome(success=True, message=f"left {body.group_name!r}")


async def _commit(edge: Ingress) -> int:
    versions = await edge.everywhere("weight_version")
    version = int(max(version for _, version in versions)) + 1
    await edge.everywhere("commit_weights", version, min(name for name, _ in versions))
    return version
