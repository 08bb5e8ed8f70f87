"""What ``/openapi.json`` says: only what is answered."""

from typing import Any

from fastapi import FastAPI

from serve_app.ingress.guard.auth import RIGHTS


def describe(app: FastAPI) -> None:
    """Let an application's OpenAPI name its keys, and leave out what FastAPI would answer."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            bearer = {"type": "http", "scheme": "bearer"}
            schema["components"]["securitySchemes"] = {"key": bearer}
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    # Statuses that LMDeploy's clients do not know are never answered.
                    operation["responses"].pop("422", None)
                    if RIGHTS.get(path) != "none":
                        operation["security"] = [{"key": []}, {}]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
