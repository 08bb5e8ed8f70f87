"""Configuration: working defaults, and one clear sentence for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_app.config import EngineArgs, RolloutArgs, StoreArgs, StoreGraphArgs
from tests.group_args import group_engine

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


@pytest.mark.parametrize(
    ("engine_kwargs", "ranks", "workers", "strategy"),
    [
        ({"tp": 4}, 1, 4, "STRICT_PACK"),
        ({"dp": 8, "ep": 8}, 8, 1, "STRICT_PACK"),
        ({"dp": 2, "ep": 8}, 2, 4, "STRICT_PACK"),
        ({"dp": 2, "tp": 4, "moe_tp_size": 4}, 2, 2, "STRICT_PACK"),
        ({"dp": 16, "ep": 16}, 16, 1, "PACK"),
    ],
)
def test_sizes_alone_make_a_group_and_its_places(
    engine_kwargs: dict[str, Any], ranks: int, workers: int, strategy: str, tiny_checkpoint: Path
) -> None:
    args = group_engine(tiny_checkpoint, engine_kwargs, min_replicas=1, max_replicas=3)
    gpus = ranks * workers
    assert (args.group.ranks, args.group.workers, args.gpus_per_replica) == (ranks, workers, gpus)
    options = args.deployment()
    assert options["placement_group_bundles"] == [{"CPU": 1}, *gpus * [{"GPU": 1, "CPU": 1}]]
    assert options["placement_group_strategy"] == strategy
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}
    assert options["autoscaling_config"]["max_replicas"] == 3  # groups


def test_one_gpu_is_no_group(tiny_checkpoint: Path) -> None:
    args = group_engine(tiny_checkpoint, {"tp": 1}, num_gpus=1)
    assert args.group.alone
    assert args.gpus_per_replica == 1
    assert args.serve.deployment().items() <= args.deployment().items()
    assert "placement_group_bundles" not in args.deployment()
    plain = EngineArgs(model=str(tiny_checkpoint), engine_kwargs={"tp": 4})
    assert plain.group.alone  # the backend refuses the key


def test_a_strategy_for_nothing_is_not_dropped_in_silence() -> None:
    from ray import serve

    options = StoreArgs.model_validate({"serve": {"placement_group_strategy": "PACK"}}).serve
    with pytest.raises(ValueError, match="placement_group_bundles"):
        serve.deployment(name="store", **options.deployment())(object)


DRIVER, GPU = {"CPU": 1.0}, {"GPU": 1.0, "CPU": 0.5}


def test_places_of_a_group_may_be_given(tiny_checkpoint: Path) -> None:
    given = [DRIVER, GPU, GPU]
    args = group_engine(
        tiny_checkpoint,
        {"tp": 2},
        placement_group_bundles=given,
        placement_group_strategy="PACK",
    )
    assert args.deployment()["placement_group_bundles"] == given
    assert args.deployment()["placement_group_strategy"] == "PACK"
    assert args.gpus_per_replica == 2


@pytest.mark.parametrize(
    ("engine_kwargs", "serve", "message"),
    [
        ({"dp": 3, "ep": 8}, {}, "expected dp to divide the 8 GPUs of the group.*got dp 3, ep 8"),
        ({"tp": 0}, {}, "expected tp to be a whole number > 0, got 0"),
        ({"dp": 8}, {}, "expected dp to divide the 1 GPUs"),
        ({"tp": 4}, {"num_gpus": 4}, "num_gpus 0, got 4: with tp 4 the replica's own process"),
        (
            {"tp": 4},
            {"placement_group_bundles": [DRIVER, GPU, GPU]},
            "tp 4 takes 4 GPUs: expected .* then 4 with GPU 1, got 2 with GPUs",
        ),
        (
            {"tp": 2},
            {"placement_group_bundles": [{"CPU": 1, "GPU": 1}, GPU]},
            "the driver's without a GPU",
        ),
        ({"tp": 2}, {"placement_group_bundles": [DRIVER, {"GPU": 2}]}, "then 2 with GPU 1, got 1"),
        ({"tp": 2}, {"max_replicas_per_node": 1}, "places a group by its GPUs alone"),
        ({}, {"placement_group_strategy": "PACK"}, "this engine has one process"),
        ({"tp": 2}, {"placement_group_strategy": "SPREAD"}, "'STRICT_PACK' or 'PACK'"),
    ],
)
def test_what_does_not_make_a_group_is_named(
    engine_kwargs: dict[str, Any], serve: dict[str, Any], message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        group_engine(tiny_checkpoint, engine_kwargs, **serve)
