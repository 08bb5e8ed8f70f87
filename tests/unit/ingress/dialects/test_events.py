"""JSON answers with arrays of expert ids in them."""

import json

import numpy as np

from serve_app.ingress.dialects.events import Json


async def test_arrays_become_nested_lists_in_json() -> None:
    ids = np.arange(200 * 2 * 3, dtype=np.uint16).reshape(200, 2, 3)
    out = Json()
    body = {"a": out.routes(ids), "b": out.routes("key"), "c": out.routes(ids[:1])}
    assert json.loads(await out.make(body)) == {
        "a": ids.tolist(),
        "b": "key",
        "c": ids[:1].tolist(),
    }
