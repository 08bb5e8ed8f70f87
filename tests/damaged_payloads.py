"""Damage: what a stranger, a bad line or another version may make of a payload."""

import base64
import json
import random
import struct
from contextlib import suppress
from typing import Any

import numpy as np

from serve_app.records import checksum

Random = random.Random


def mutate_bytes(rng: Random, raw: bytes) -> bytes:
    """Flip bits, cut, grow, repeat, or overwrite a stretch."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(6)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 3:
            out[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**64 - 1)))
        elif kind == 4:
            del out[at : at + rng.choice((1, 4, 16))]
        else:
            out[at : at + 4] = out[:4]
    return bytes(out)


def mutate_text(rng: Random, text: str) -> str:
    """Damage a text, or the bytes in its base64, or the sizes that it promises."""
    kind = rng.randrange(4)
    head, _, tail = text.rpartition(":")
    if kind == 0:
        try:
            raw = base64.b64decode(tail, validate=True)
        except ValueError:
            raw = tail.encode()
        tail = base64.b64encode(mutate_bytes(rng, raw)).decode()
        return f"{head}:{tail}" if head else tail
    if kind == 1 and head:
        sizes = "x".join(str(hostile_int(rng))[:30] for _ in range(rng.choice((2, 3, 3, 4))))
        return f"nrlre1:{rng.choice(('int8', 'int64', 'int32'))}:{sizes}:{tail}"
    damaged = mutate_bytes(rng, text[: rng.randint(0, len(text))].encode() or b"A")
    return damaged.decode("latin-1") if kind == 2 else damaged.decode("utf-8", "replace")


def hostile_int(rng: Random) -> int:
    return rng.choice((0, 1, -1, 2, 7, 2**31, 2**40, 10**12, 2**63, 2**64 + 1, 10**25))


def hostile_value(rng: Random) -> Any:
    """Return something that no field should be."""
    deep: Any = 0
    for _ in range(rng.choice((3, 100, 5_000))):
        deep = [deep]
    return rng.choice(
        (
            None, True, 1.5, float("nan"), "", "1", b"x", [], {}, deep, [[1], 2], {"a": 1},
            10**4400, -(10**30), [10**4400] * 3, "x" * 100_000, [hostile_int(rng)] * 3, object(),
        )
    )  # fmt: skip


def mutate_object(rng: Random, fields: dict[str, Any]) -> dict[str, Any]:
    """Drop, add, or replace fields, or damage what they hold."""
    out = dict(fields)
    name = rng.choice(tuple(out))
    kind = rng.randrange(5)
    if kind == 0:
        del out[name]
    elif kind == 1:
        out[rng.choice(("start", "dtype", "extra", "shape"))] = hostile_value(rng)
    elif kind == 2:
        out[name] = hostile_value(rng)
    elif kind == 3 and "shape" in out:
        out["shape"] = [hostile_int(rng) if rng.random() < 0.5 else n for n in out["shape"]]
    else:
        out[name] = damaged(rng, out[name])
    return out


def mutate_list(rng: Random, nested: list[Any]) -> list[Any]:
    """Replace one member at some depth, drop one, or bend the nesting."""
    out = [list(map(list, row)) for row in nested]
    target: list[Any] = out
    for _ in range(rng.randrange(3)):
        target = rng.choice(target)
    kind, at = rng.randrange(4), rng.randrange(len(target))
    if kind == 0:
        del target[at]
    elif kind == 1:
        target[at] = hostile_value(rng)
    elif kind == 2:
        target[at] = hostile_int(rng)
    else:
        target.append(target[at])
    return out


def mutate_array(rng: Random, ids: np.ndarray[Any, Any]) -> Any:
    if rng.random() < 0.5:
        dtype: Any = rng.choice(("f4", "i8", ">u2", "?", "O", "U1", "u8"))
        return ids.astype(dtype)
    return rng.choice((ids[0], ids[:0], ids[:, :1], ids[::-1], ids[..., None], np.array(3)))


def damaged(rng: Random, payload: Any) -> Any:
    """Return a payload with something wrong, of the same type where that makes sense."""
    if rng.random() < 0.05:
        return hostile_value(rng)
    if isinstance(payload, bytes):
        return reseal(rng, mutate_bytes(rng, payload))
    if isinstance(payload, str):
        return mutate_text(rng, payload)
    if isinstance(payload, dict):
        return mutate_object(rng, payload)
    if isinstance(payload, np.ndarray):
        return mutate_array(rng, payload)
    if isinstance(payload, list) and payload and isinstance(payload[0], list):
        return mutate_list(rng, payload)
    return hostile_value(rng)


def reseal(rng: Random, raw: bytes) -> bytes:
    """Give bytes of ours a matching checksum, sometimes: a stranger can compute it too."""
    if len(raw) < 24 or rng.random() < 0.5:
        return raw
    length = rng.choice((struct.unpack_from("<I", raw, 12)[0], len(raw) - 24, 40))
    header = raw[24 : 24 + length]
    if rng.random() < 0.5:
        with suppress(ValueError, AttributeError, RecursionError):  # not every damage is JSON
            fields = mutate_object(rng, json.loads(header))
            header = json.dumps(fields, default=repr, skipkeys=True).encode()
    elif rng.random() < 0.1:
        header = b"[" * 60_000
    seal = checksum(np.frombuffer(header or b" ", np.uint8))
    prefix = struct.pack("<8sHHIQ", raw[:8], raw[8], 0, len(header), seal)
    return prefix + header + raw[24 + length :]
