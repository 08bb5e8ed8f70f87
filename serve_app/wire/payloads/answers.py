"""Whole answers, handed in by mistake where the routes of one were expected."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from serve_app.errors import RecordError

_ROUTES = "routed_experts"
_PROMPT = "prompt_routed_experts"
_MARKS = ("meta_info", "choices", "output_ids", "outputs", _PROMPT)
"""Fields of answers which no payload has."""
_DOORS = ("meta_info", "choices", "message", "delta", "sgl_ext", "outputs", "response")
"""Fields of answers which routes are found behind."""
_DEEP = 5
_MEMBERS = 4
_JSON = re.compile(r"\s*[\[{]")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},:]', re.DOTALL)


def refuse_whole_answer(payload: object) -> None:
    """Raise `RecordError` for an answer, or the JSON text of one, that says where its routes are.

    Nothing is parsed: an answer's text may be large, and of a stranger.
    """
    if isinstance(payload, (bytes, bytearray)) and payload[:1] in (b"{", b"["):
        payload = payload.decode(errors="replace")
    if isinstance(payload, str):
        if _JSON.match(payload):
            raise RecordError(_of_text(payload))
    elif isinstance(payload, Mapping):
        _refuse(payload, any(mark in payload for mark in _MARKS))
    elif isinstance(payload, list):
        _refuse(payload, bool(payload) and isinstance(payload[0], Mapping))
    elif not isinstance(payload, np.ndarray) and hasattr(payload, _ROUTES):
        raise RecordError(_whole(f".{_ROUTES}"))


def _refuse(payload: Mapping[str, Any] | list[Any], whole: bool) -> None:
    if not whole:
        return
    halves = isinstance(payload, Mapping) and payload.get(_PROMPT) is not None
    raise RecordError(_whole(_place(payload), halves=halves))


def _whole(place: str | None, got: str = "the whole answer", halves: bool = False) -> str:
    expected = f"expected the routed experts of an answer, got {got}"
    if halves:
        rest = "None" if place is None else f"answer{place}"
        return f"{expected}: pass answer['{_PROMPT}'] and {rest} to decode_halves"
    if place is None:
        return f"{expected}, and there are none in it"
    return f"{expected}: pass answer{place}"


def _place(value: object, deep: int = _DEEP) -> str | None:
    """Return where an answer's routes are, as one would write it, None if there are none."""
    inside: Iterator[tuple[str, object]] = iter(())
    if isinstance(value, Mapping):
        if value.get(_ROUTES) is not None:
            return f"['{_ROUTES}']"
        inside = ((f"['{door}']", value[door]) for door in _DOORS if door in value)
    elif isinstance(value, list):
        inside = ((f"[{member}]", value[member]) for member in range(min(_MEMBERS, len(value))))
    for step, behind in inside if deep else ():
        if (place := _place(behind, deep - 1)) is not None:
            return step + place
    return None


def _of_text(text: str) -> str:
    place = _place_in(text)
    if any(f'"{mark}"' in text for mark in _MARKS) or (place or "").count("[") > 1:
        whole = _whole(place, "the JSON text of a whole answer")
        return whole if place is None else whole.replace("pass", "parse it and pass")
    return "expected routes, got JSON text: parse it first"


def _place_in(text: str) -> str | None:
    """Do as `_place` does in JSON text: keep the way to where the reading is, and no value."""
    way: list[str | int] = []
    name = ""
    for token in _TOKEN.finditer(text):
        mark = text[token.start()]
        if mark == '"':
            name = token[0][1:-1] if token.end() - token.start() < 32 else ""
        elif mark in "[{" and len(way) < 64:
            way.append(0 if mark == "[" else "")
        elif not way or mark in "[{":
            return None
        elif mark in "]}":
            way.pop()
        elif mark == ":":
            way[-1] = name
            found = name == _ROUTES and not text[
                token.end() : token.end() + 16
            ].lstrip().startswith("null")
            if found and all(isinstance(step, int) or step in _DOORS for step in way[:-1]):
                return "".join(f"[{step!r}]" for step in way)
        elif isinstance(way[-1], int):
            way[-1] += 1
    return None
