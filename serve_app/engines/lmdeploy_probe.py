"""Do routes arrive as they must? Asked once, before the first request, of the engine itself.

For most families, and with some settings, LMDeploy answers None, or columns that nobody wrote.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.engines.base import ModelInfo
from serve_app.errors import EngineUnavailable

PROMPT_TOKENS = 3
NEW_TOKENS = 2
NOTHING = (0xFFFF, 0)
"""What LMDeploy leaves in the columns of a layer without experts: all of the one or the other."""


def probe_prompt(info: ModelInfo, eos_ids: frozenset[int]) -> list[int]:
    """Return a few tokens that end nothing."""
    plain = [token for token in range(min(info.vocab_size, 64)) if token not in eos_ids]
    return (plain * PROMPT_TOKENS)[-PROMPT_TOKENS:]


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
