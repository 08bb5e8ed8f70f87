"""Do routes arrive as they must? Asked once, before the first request, of the engine itself.

For most families, and with some settings, LMDeploy answers None, or columns that nobody wrote.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve_app.engines.base import ModelInfo
from serve_app.engines.lmdeploy.sampling import generation_config
from serve_app.errors import EngineUnavailable
from serve_app.types import GenerateRequest

if TYPE_CHECKING:
    from serve_app.engines.lmdeploy.backend import Backend

PROMPT_TOKENS = 3
NEW_TOKENS = 2
NOTHING = (0xFFFF, 0)
"""What LMDeploy leaves in the columns of a layer without experts: all of the one or the other."""


async def probe(
    backend: "Backend",
    info: ModelInfo,
    routes: bool,
    take_array: Callable[[Any], Awaitable[Any]],
) -> None:
    """Sample a few tokens, and check their routes; raise `EngineUnavailable` where they fail."""
    prompt = [index % info.vocab_size for index in range(PROMPT_TOKENS)]
    request = GenerateRequest(input_ids=prompt, temperature=0)
    config = generation_config(
        request, stop_ids=(), max_new_tokens=NEW_TOKENS, routes=routes, padding=backend.padding
    )
    session = backend.open_session()
    outputs = [out async for out in backend.run(session, prompt, config)]
    backend.recomputed(session)
    last = outputs[-1]
    if sum(len(out.token_ids) for out in outputs) != NEW_TOKENS:
        raise EngineUnavailable(f"LMDeploy ended the probe request with {last.status.name}")
    if routes:
        check_routes(await take_array(last.rows), PROMPT_TOKENS + NEW_TOKENS - 1, info)


def check_routes(rows: npt.NDArray[Any] | list[Any] | None, count: int, info: ModelInfo) -> None:
    """Raise `EngineUnavailable` unless ``rows`` are ``count`` rows of this model's routes."""
    if rows is None:
        raise EngineUnavailable(_wrong(info, "got none"))
    ids = np.asarray(rows)
    expected = (count, info.layers, info.top_k)
    if ids.shape != expected or ids.dtype.kind not in "iu":
        raise EngineUnavailable(
            _wrong(info, f"expected integers {list(expected)}, got {ids.dtype}{list(ids.shape)}")
        )
    sparse = np.sort(ids[:, list(info.moe_layers)], axis=-1)
    if (high := int(sparse.max())) >= info.num_experts:
        raise EngineUnavailable(
            _wrong(info, f"expected experts below {info.num_experts}, got {high}")
        )
    if info.top_k > 1 and not (sparse[..., 1:] > sparse[..., :-1]).all():
        raise EngineUnavailable(_wrong(info, "a token has the same expert twice in a layer"))
    for layer in set(range(info.layers)) - set(info.moe_layers):
        if not any((ids[:, layer] == nothing).all() for nothing in NOTHING):
            raise EngineUnavailable(_wrong(info, f"layer {layer} should have no experts, got some"))


def _wrong(info: ModelInfo, what: str) -> str:
    return f"{info.family}: the probe request's routed experts are wrong: {what}"
