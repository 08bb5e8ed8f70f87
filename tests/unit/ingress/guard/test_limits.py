"""How much one replica takes on."""

import pytest
from pydantic import ValidationError

from serve_app.config import IngressArgs
from serve_app.ingress.guard.limits import Busy, Load


def test_control_keeps_its_room() -> None:
    assert IngressArgs().sampling_limit == 384
    with pytest.raises(ValidationError, match="no room for aborts"):
        IngressArgs.model_validate({"max_sampling": 512})


def test_load_is_counted_where_it_is_sampled() -> None:
    load = Load(IngressArgs.model_validate({"max_sampling": 3, "max_per_key": 2}))
    for _ in range(2):
        assert load.enter("/generate", "api-0") is None
    assert load.enter("/v1/completions", "api-0") == Busy(
        429, "at most 2 requests of one key at once"
    )
    assert load.enter("/health", "api-0") is None
    assert load.enter("/generate", "api-1") is None
    busy = load.enter("/generate", "api-2")
    assert busy is not None
    assert busy.status == 503
    load.leave("/generate", "api-0")
    assert load.enter("/generate", "api-2") is None
