"""How a route finds the replica that it runs in."""

from typing import Annotated

from fastapi import Depends, Request

from serve_app.ingress.edge.edge import Ingress


def _edge_of(request: Request) -> Ingress:
    edge = request.app.state.locate()
    assert isinstance(edge, Ingress)
    return edge


Edge = Annotated[Ingress, Depends(_edge_of)]
"""A dependency: methods as routes break with new FastAPIs."""
