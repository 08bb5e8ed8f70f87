"""The HTTP edge over real sockets, in front of the graph in Serve's local testing mode."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from ray import serve

from graphs.rollout import build
from serve_app import RoutedExpertsClient
from serve_app.client.served import Handles
from serve_app.config import RolloutArgs
from serve_app.ingress.app import make_http
from serve_app.ingress.edge.edge import Ingress


class LocalGraph:
    """A served graph without Ray; edges in front of it are made as tests need them."""

    def __init__(self, model: Path, **engine: Any) -> None:
        self._args: dict[str, Any] = {
            "engine": {"model": str(model), "dtype": "float32", **engine},
            "store": {"backend": "memory"},
        }
        app = build(RolloutArgs.model_validate(self._args))
        edge = serve.run(app, name="local", _local_testing_mode=True)
        self.handles: Handles = edge.handles.remote().result(timeout_s=30)

    @property
    def client(self) -> RoutedExpertsClient:
        return RoutedExpertsClient("local", handles=self.handles)

    def edge(self, scale: dict[str, int] | None = None, **ingress: Any) -> Ingress:
        """Return another ingress replica in front of the same engine.

        With ``scale`` it believes that the engine has these Serve options.
        """
        engine = {**self._args["engine"], **({"serve": scale} if scale else {})}
        args = RolloutArgs.model_validate({**self._args, "engine": engine, "ingress": ingress})
        return Ingress(args.ingress, args.engine, self.handles.engine, self.handles.decoder)


@contextmanager
def client_of(edge: Ingress, **options: Any) -> Iterator[httpx.Client]:
    """Serve an edge and give a client of it."""
    with listening(edge) as at, httpx.Client(base_url=at, timeout=30, **options) as client:
        yield client


@contextmanager
def listening(edge: Ingress) -> Iterator[str]:
    """Serve an edge on a free port; give its address."""
    config = uvicorn.Config(make_http(lambda: edge), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        at.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{at.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
