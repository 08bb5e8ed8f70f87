"""The HTTP edge: what goes in and out is LMDeploy's, what happens is the engine deployment's."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import IngressArgs
from serve_app.deployments.context import application
from serve_app.deployments.decoder import ExpertDecoder
from serve_app.deployments.engine import InferenceEngine
from serve_app.errors import EngineOverloaded, EngineUnavailable, InvalidRequest, R3Error
from serve_app.ingress.schemas import ErrorBody, GenerateAnswer, GenerateBody
from serve_app.served import Handles, await_answer
from serve_app.types import GenerateRequest, GenerateResult

_STATUS: dict[type[R3Error], int] = {
    InvalidRequest: 400,
    EngineOverloaded: 429,
    EngineUnavailable: 503,
}


class Ingress:
    """Speaks HTTP for the graph. Tensors stay off it where a Ray client can have a reference."""

    def __init__(
        self,
        args: IngressArgs,
        engine: DeploymentHandle[InferenceEngine],
        decoder: DeploymentHandle[ExpertDecoder],
    ) -> None:
        self._args = args
        self._engine = engine.options(_by_reference=True)
        self._decoder = decoder.options(_by_reference=True)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Sample one rollout."""
        result: GenerateResult = await await_answer(
            self._engine.generate.remote(request), self._args.request_timeout_s
        )
        return result

    async def check_engine(self) -> None:
        """Raise `EngineUnavailable` when no engine replica serves."""
        await await_answer(self._engine.info.remote(), timeout_s=10.0)

    async def handles(self) -> Handles:
        """Give a client in Serve's local testing mode what it cannot look up there."""
        return Handles(self._engine, self._decoder, application())


def this_replica() -> Any:
    """Return the replica that answers. A dependency: methods as routes break with new FastAPIs."""
    return serve.get_replica_context().servable_object


Edge = Annotated[Ingress, Depends(this_replica)]
http = FastAPI(title="r3serve", docs_url=None, redoc_url=None)


@http.get("/health", responses={503: {"model": ErrorBody}})
async def health(edge: Edge) -> dict[str, str]:
    """Answer 200 when an engine replica serves, 503 otherwise."""
    await edge.check_engine()
    return {"status": "ok"}


@http.post("/generate", responses={status: {"model": ErrorBody} for status in (400, 429, 503)})
async def generate(body: GenerateBody, edge: Edge) -> GenerateAnswer:
    """Sample one rollout."""
    result = await edge.generate(body.to_request())
    return GenerateAnswer.of(result, body.return_logprob)


@http.exception_handler(RequestValidationError)
async def _refuse(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    return _failure(400, "invalid_request_error", f"{where}: {first['msg']}")


@http.exception_handler(R3Error)
async def _fail(_: Request, error: R3Error) -> JSONResponse:
    return _failure(_STATUS.get(type(error), 500), type(error).__name__, str(error))


def _failure(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse(ErrorBody(message=message, type=kind, code=status).model_dump(), status)
