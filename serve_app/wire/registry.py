"""All formats by name, and the way in and out: what a payload is, its own first bytes tell."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from serve_app.errors import RecordError
from serve_app.records import Record, make_record
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
from serve_app.wire.payloads.answers import refuse_whole_answer
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.keyed import is_key
from serve_app.wire.payloads.refusal import no_rows, shown
from serve_app.wire.payloads.tensors import Tensor

Payload = (
    str | bytes | bytearray | memoryview | list[Any] | Mapping[str, Any] | npt.NDArray[Any] | Tensor
)
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
    the client of its store; and for a whole answer, naming where in it the routes are.
    """
    refuse_whole_answer(payload)
    if isinstance(payload, (str, list)) and not payload:
        raise no_rows(payload)
    name = format or _sniffed(payload)
    if name not in FORMATS:
        raise RecordError(f"expected a format out of {', '.join(FORMATS)}, got {shown(name)}")
    if name == "xtuner":
        return xtuner.decode(payload, expected, allow_pickle=allow_pickle)
    return FORMATS[name].decode(payload, expected)


def decode_halves(
    prompt: Payload,
    generated: Payload | None,
    expected: Expected,
    *,
    format: FormatName | None = None,
    allow_pickle: bool = False,
) -> Record:
    """Return one record of the prompt's rows and those after them, which came apart.

    vLLM 0.21 answers so (PR 39917): ``prompt_routed_experts`` of the request, P rows, and
    ``routed_experts`` of each completion, G-1; ``generated`` is None, or has no rows, where one
    token was sampled. Both are read as `decode` reads them; ``expected.rows`` is their sum,
    ``extra_rows`` are the last, and the generated rows start where the prompt's end. Raises
    `RecordError` that names the half, one without a single real row too.
    """
    how: Any = {"format": format, "allow_pickle": allow_pickle}
    if generated is None or (not isinstance(generated, Mapping) and _is_empty(generated)):
        return _half("prompt", prompt, expected, how)
    first = _half("prompt", prompt, replace(expected, rows=None, extra_rows=0), how)
    rest = None if expected.rows is None else expected.rows - first.meta.rows
    if rest is not None and rest < 1:
        raise RecordError(
            f"expected {expected.rows} rows in both halves, got {first.meta.rows} in the prompt's"
        )
    second = _half("generated", generated, replace(expected, rows=rest, start=first.meta.stop), how)
    if first.meta.tracks or second.meta.tracks or first.weight_version != second.weight_version:
        raise RecordError(
            "expected halves of one weight version and without tracks, got records of our own: put"
            " the second with parent= the first"
        )
    joined = make_record(
        np.concatenate([first.ids, second.ids]),
        num_experts=expected.num_experts,
        start=first.start,
        moe_layers=expected.moe,
        weight_version=first.weight_version,
        valid=np.concatenate([first.valid, second.valid]),
    )
    after = (first.meta.rows + row for row in second.meta.unrouted_rows)
    meta = joined.meta._replace(unrouted_rows=(*first.meta.unrouted_rows, *after))
    return replace(joined, meta=meta)


def encode(record: Record, format: FormatName) -> Any:
    """Return a record's payload in a format.

    Raises `RecordError` for a record that says what the format cannot: rows that route natively.
    """
    if format not in FORMATS:
        raise RecordError(f"expected a format out of {', '.join(FORMATS)}, got {shown(format)}")
    return FORMATS[format].encode(record)


def _is_empty(payload: Any) -> bool:
    return hasattr(payload, "__len__") and not len(payload)


def _half(name: str, payload: Payload, expected: Expected, how: Any) -> Record:
    try:
        return decode(payload, expected, **how)
    except RecordError as error:
        raise RecordError(f"{name} half: {error}") from None


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
