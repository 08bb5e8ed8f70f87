"""Configuration: working defaults, and one clear sentence for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import EngineArgs, RolloutArgs, StoreGraphArgs

GRAPHS = Path(__file__).parents[2] / "graphs"


def test_only_the_model_is_required(tiny_checkpoint: Path) -> None:
    args = RolloutArgs.model_validate({"engine": {"model": str(tiny_checkpoint)}})
    assert args.engine.enable_return_routed_experts is False
    assert args.engine.enable_transfer_obj_ref is False
    assert args.store.lease_s == 3600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": {"model": "no/such/directory"}}, "checkpoint directory"),
        ({"engine": {}}, "Field required"),
        ({"engine": {"modle": "x"}}, "Extra inputs are not permitted"),
        ({"storage": {}}, "Extra inputs are not permitted"),
        ({"store": {"lease_s": 0}}, "greater than 0"),
        ({"decoder": {"serve": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas 3 is above"),
        (
            {"engine": {"enable_transfer_obj_ref": True}},
            "enable_return_routed_experts is off: set both, or neither",
        ),
    ],
)
def test_what_is_wrong_is_named(
    change: dict[str, Any], message: str, tiny_checkpoint: Path
) -> None:
    engine = {"model": str(tiny_checkpoint)} | change.get("engine", {})
    if change.get("engine") == {}:
        engine = {}
    with pytest.raises(ValidationError, match=message):
        RolloutArgs.model_validate(change | {"engine": engine})


def test_recording_alone_is_allowed(tiny_checkpoint: Path) -> None:
    args = EngineArgs(model=str(tiny_checkpoint), enable_return_routed_experts=True)
    assert args.enable_transfer_obj_ref is False


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_have_no_key_that_serve_or_we_would_ignore(
    path: Path, tiny_checkpoint: Path
) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    for application, parsed in zip(config["applications"], schema.applications, strict=True):
        assert set(application) <= set(type(parsed).model_fields)
        args = application["args"]
        if "engine" in args:
            args["engine"]["model"] = str(tiny_checkpoint)
        model = RolloutArgs if "engine" in args else StoreGraphArgs
        assert model.model_validate(args).model_fields_set == set(args)


def test_the_shipped_graph_fits_two_cpus_at_its_largest(tiny_checkpoint: Path) -> None:
    config = yaml.safe_load((GRAPHS / "rollout.yaml").read_text())["applications"][0]["args"]
    config["engine"]["model"] = str(tiny_checkpoint)
    args = RolloutArgs.model_validate(config)
    parts = [args.engine.serve, args.store.serve, args.decoder.serve, args.ingress.serve]
    assert sum(part.num_cpus * part.max_replicas for part in parts) <= 2
    assert args.engine.serve.max_replicas > 1
    assert args.decoder.serve.max_replicas > 1
