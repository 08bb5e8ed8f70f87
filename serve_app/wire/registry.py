"""All formats by name, and the way in and out: what a payload is, its own first bytes tell."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.formats import (
    array,
    lmdeploy,
    nemo_rl,
    ours,
    prime_rl,
    sglang,
    sglang_tagged,
    skyrl,
    vllm,
    xtuner,
)
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.keyed import is_key
from serve_app.wire.payloads.refusal import shown

Payload = str | bytes | bytearray | memoryview | list[Any] | Mapping[str, Any] | npt.NDArray[Any]
"""What answers carry: texts, bytes, nested lists ``[rows][layers][top_k]``, objects, arrays."""
FormatName = Literal[
    "r3serve",
    "lmdeploy",
    "array",
    "sglang",
    "sglang_tagged",
    "vllm",
    "prime_rl",
    "nemo_rl",
    "skyrl",
    "xtuner",
]


class Format(Protocol):
    """What a format's module has."""

    def matches(self, payload: object) -> bool:
        """Tell, from type and first bytes alone, whether a payload is of this format."""

    def decode(self, payload: object, expected: Expected) -> Record:
        """Return the payload's record; raise `RecordError` for anything that is not one."""

    def encode(self, record: Record) -> Any:
        """Return the record's payload; raise `RecordError` for what the format cannot say."""


FORMATS: Mapping[FormatName, Format] = MappingProxyType(
    {
        "r3serve": ours,
        "lmdeploy": lmdeploy,
        "array": array,
        "sglang": sglang,
        "sglang_tagged": sglang_tagged,
        "vllm": vllm,
        "prime_rl": prime_rl,
        "nemo_rl": nemo_rl,
        "skyrl": skyrl,
        "xtuner": xtuner,
    }
)


def decode(
    payload: Payload,
    expected: Expected,
    *,
    format: FormatName | None = None,
    allow_pickle: bool = False,
) -> Record:
    """Return the record ``[rows, layers, top_k]`` of a payload in any format.

    ``format=None`` takes the one format that the payload begins like. Nothing is unpickled but
    with ``allow_pickle``, and nothing allocated beyond a small multiple of the payload. Raises
    `RecordError` naming what was expected and what came, for store keys too: reading one takes
    the client of its store.
    """
    name = format or _sniffed(payload)
    if name not in FORMATS:
        raise RecordError(f"expected a format out of {', '.join(FORMATS)}, got {shown(name)}")
    if name == "xtuner":
        return xtuner.decode(payload, expected, allow_pickle=allow_pickle)
    return FORMATS[name].decode(payload, expected)


def encode(record: Record, format: FormatName) -> Any:
    """Return a record's payload in a format.

    Raises `RecordError` for a record that says what the format cannot: rows that route natively.
    """
    if format not in FORMATS:
        raise RecordError(f"expected a format out of {', '.join(FORMATS)}, got {shown(format)}")
    return FORMATS[format].encode(record)


def _sniffed(payload: object) -> FormatName:
    if is_key(payload):
        raise RecordError(
            "expected routes, got the key of some: read it with RoutedExpertsClient.decode or get"
        )
    names: list[FormatName] = [name for name in FORMATS if FORMATS[name].matches(payload)]
    if len(names) != 1:
        like = f"like {' and '.join(names)}: say which" if names else "like none of them"
        raise RecordError(f"expected one of {', '.join(FORMATS)}, got {shown(payload)}, {like}")
    return names[0]
