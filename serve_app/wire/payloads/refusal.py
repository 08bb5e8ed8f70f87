"""The one error of a payload: what was expected, and what came, never more than a line of it."""

import numpy as np

from serve_app.errors import RecordError


def refusal(expected: str, found: object) -> RecordError:
    """Return the error that says what was expected and what came instead."""
    return RecordError(f"expected {expected}, got {shown(found)}")


def no_rows(found: object) -> RecordError:
    """Return the error of a payload that is whole, and has not one row."""
    return RecordError(f"expected routes, got no rows: nothing was recorded in {shown(found)}")


def shown(value: object) -> str:
    """Return a value in few words, however big, deep or hostile it is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, int):
        # Python refuses to print an integer of more than 4,300 digits.
        return str(value) if value.bit_length() <= 64 else f"int of {value.bit_length()} bits"
    if value is None or isinstance(value, float):
        return str(value)
    if isinstance(value, (str, bytes, bytearray)):
        head = repr(value[:24])
        return head if len(value) <= 24 else f"{head}… of {len(value)}"
    if isinstance(value, (list, tuple)):
        flat = [shown(v) if isinstance(v, int) else type(v).__name__ for v in value[:4]]
        more = f", … {len(value)} in all" if len(value) > 4 else ""
        return f"{type(value).__name__}[{', '.join(flat)}{more}]"
    return type(value).__name__
