"""A Serve config file, read strictly: Serve itself ignores keys that it does not know."""

import importlib
import inspect
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from serve_app.config import MODELS_ELSEWHERE


@dataclass(frozen=True, slots=True)
class ServedApplication:
    """One application of a config file: its name, and its builder's arguments if it takes any."""

    name: str
    args: BaseModel | None


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """What a config file serves, and every reason why it is wrong."""

    applications: list[ServedApplication]
    problems: list[str]


def serve_config_text(path: Path) -> str:
    """Return a config file's text, or what a RayService manifest carries as `serveConfigV2`."""
    text = path.read_text()
    for document in yaml.load_all(text, _Strict):
        if isinstance(document, dict) and document.get("kind") == "RayService":
            return str(document["spec"]["serveConfigV2"])
    return text


def check_serve_config(text: str, models_elsewhere: bool = False) -> CheckedConfig:
    """Check a config file: Serve's keys, each builder, and each builder's arguments.

    ``models_elsewhere``: do not look for checkpoint directories on this machine.
    """
    try:
        config = yaml.load(text, _Strict)
    except yaml.YAMLError as error:
        return CheckedConfig([], [f"not YAML: {error}"])
    if not isinstance(config, dict):
        return CheckedConfig([], [f"expected a mapping, got {type(config).__name__}"])
    problems = list(_unknown_keys(config, ServeDeploySchema, ""))
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        problems += _lines(error, "")
        return CheckedConfig([], problems)
    applications = []
    for index, application in enumerate(config["applications"]):
        where = f"applications[{index}]"
        try:
            args = _builder_args(application, MODELS_ELSEWHERE if models_elsewhere else None)
            applications.append(ServedApplication(application.get("name", "default"), args))
        except ValidationError as error:
            problems += _lines(error, f"{where}.args")
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            problems.append(f"{where}.import_path: {error}")
    return CheckedConfig(applications, problems)


def _builder_args(application: dict[str, Any], context: dict[str, bool] | None) -> BaseModel | None:
    """Validate a builder's arguments as Serve does when it calls it."""
    module, _, name = application["import_path"].replace(":", ".").rpartition(".")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `serve run` finds modules
    builder = getattr(importlib.import_module(module), name)
    args = application.get("args", {})
    if isinstance(builder, Application):
        if args:
            raise ValueError(f"{name} is an application, not a builder: it takes no args")
        return None
    (parameter,) = inspect.signature(builder).parameters.values()
    model = parameter.annotation
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise TypeError(f"expected a builder whose parameter is a pydantic model, got {model}")
    return model.model_validate(args, context=context)


def _unknown_keys(value: Any, annotation: Any, where: str) -> Iterator[str]:
    """Name every key that none of an annotation's models has."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, annotation, f"{where}[{index}]")
    models = list(_models(annotation))
    if not isinstance(value, dict) or not models:
        return
    known = {name: field for model in models for name, field in model.model_fields.items()}
    for key, item in value.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            yield f"{path}: no such key; Serve would ignore it. Known here: {sorted(known)}"
        else:
            yield from _unknown_keys(item, known[key].annotation, path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _lines(error: ValidationError, where: str) -> list[str]:
    lines = []
    for one in error.errors():
        path = ".".join([where, *map(str, one["loc"])]).strip(".")
        lines.append(f"{path}: {one['msg']} (got {one['input']!r:.80})")
    return lines


class _Strict(yaml.SafeLoader):
    """YAML in which a key may stand once only; PyYAML takes the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a second key of the same name."""
        seen = set[Any]()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
