"""xtuner, before it passed keys: base64 of a cloudpickled array, nested list, or reference.

Source: InternLM/xtuner PR 1658, which replaced it.
Reading a pickle runs what its sender wrote into it, so it is read for ``allow_pickle=True``
only. A reference cannot be resolved here: that needs Ray, and the cluster it came from.
"""

import base64
import pickle

from serve_app.errors import RecordError
from serve_app.records import Record
from serve_app.wire.formats import array, lmdeploy
from serve_app.wire.payloads.base64_ids import read_bytes
from serve_app.wire.payloads.expected import Expected
from serve_app.wire.payloads.refusal import refusal
from serve_app.wire.payloads.whole_rows import whole_rows

_TEXTS = ("gASV", "gAWV")
"""Base64 of how a pickle of protocol 4 or 5 begins."""


def matches(payload: object) -> bool:
    """Tell base64 of what begins as a pickle does."""
    return isinstance(payload, str) and payload.startswith(_TEXTS)


def decode(payload: object, expected: Expected, *, allow_pickle: bool = False) -> Record:
    """Return the record of a pickled array or list, from a sender who is trusted with the process.

    Raises `RecordError` without ``allow_pickle``, before anything is read.
    """
    if not matches(payload):
        raise refusal("base64 of a pickle", payload)
    if not allow_pickle:
        raise RecordError(
            "expected a format that is safe to read, got a pickle, which can run code: pass"
            " allow_pickle=True if you trust its sender"
        )
    raw = read_bytes(payload)
    try:
        value = pickle.loads(raw)
    except Exception as error:  # noqa: BLE001 - a pickle raises whatever its sender chose
        raise RecordError(f"expected a pickled array, got {type(error).__name__}") from None
    if array.matches(value):
        return array.decode(value, expected)
    if isinstance(value, list):
        return lmdeploy.decode(value, expected)
    raise refusal("a pickled array or nested list (resolve references with ray.get)", value)


def encode(record: Record) -> str:
    """Return base64 of the pickled ids, all layers."""
    ids = whole_rows(record, "a pickled array")
    return base64.b64encode(pickle.dumps(ids, protocol=5)).decode()
