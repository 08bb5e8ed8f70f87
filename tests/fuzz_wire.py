"""Throws damaged and hostile payloads at every decoder: ``python -m tests.fuzz_wire --seconds 60``.

Every case ends with a `RecordError` or a valid record, and takes memory in proportion to its
payload. A case is reproduced by its number: ``--first N --cases 1``.
"""

import argparse
import base64
import itertools
import json
import random
import struct
import time
import tracemalloc
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.records import Record, checksum, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FORMATS, FormatName, decode, encode

COPIES = 12
"""How often a payload's bytes may exist while it is decoded, as base64, ids, masks, record."""
CONSTANT = 256 * 1024

Case = tuple[Any, Expected, FormatName | None]
Random = random.Random


def size(payload: Any) -> int:
    """Bytes that a payload itself takes, the integers in lists as pointers."""
    if isinstance(payload, (str, bytes, bytearray, memoryview)):
        return len(payload)
    if isinstance(payload, np.ndarray):
        return payload.nbytes
    total, todo = 0, [payload]
    while todo:
        value = todo.pop()
        if isinstance(value, (list, tuple)):
            total += 56 + 8 * len(value)
            todo += value
        elif isinstance(value, Mapping):
            total += 64 + 100 * len(value)
            todo += value.values()
        elif isinstance(value, (str, bytes)):
            total += len(value)
    return total


def limit(payload: Any, expected: Expected) -> int:
    """Most bytes that decoding may take; the caller's own model spreads MoE layers over all."""
    return int(COPIES * size(payload) * expected.layers / len(expected.moe)) + CONSTANT


def whole_case(rng: Random) -> tuple[Record, Expected]:
    """Return a record, sometimes with dense layers, a start or invalid rows, and its model."""
    layers, top_k, rows = (
        rng.randint(1, 6),
        rng.randint(1, 4),
        rng.choice((1, 2, 7, 200, rng.choice((200, 9_000)))),
    )
    experts = rng.choice((4, 128, 255, 256, 257, 32_768, 65_535))
    moe = tuple(sorted(rng.sample(range(layers), rng.randint(1, layers))))
    values = np.random.default_rng(rng.getrandbits(32))
    valid = values.random(rows) < 0.8 if rng.random() < 0.3 else None
    start = rng.choice((0, 0, 5, 2**40))
    record = make_record(
        values.integers(0, experts, (rows, layers, top_k)),
        num_experts=experts,
        start=start,
        moe_layers=moe,
        valid=valid,
    )
    known = rng.choice((None, rows))
    return record, Expected(layers, top_k, experts, moe, known, rng.choice((0, start)))


def payload_of(rng: Random, record: Record) -> tuple[Any, FormatName]:
    name = rng.choice(tuple(FORMATS))
    try:
        return encode(record, name), name
    except RecordError:
        return encode(record, "r3serve"), "r3serve"


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


def make_case(number: int) -> Case:
    rng = Random(number)
    record, expected = whole_case(rng)
    payload, name = payload_of(rng, record)
    if rng.random() < 0.9:
        payload = damaged(rng, payload)
    if rng.random() < 0.1:
        _, expected = whole_case(rng)
    forced = rng.choice((None, None, name, rng.choice(tuple(FORMATS))))
    return payload, expected, forced


def check(case: Case) -> bool:
    """Decode one case; return whether it gave a record. Raises whatever should not happen."""
    payload, expected, name = case
    message = ""
    try:
        record = decode(payload, expected, format=name)
    except RecordError as error:
        message = str(error)
    assert len(message) < 1_000
    if message:
        return False
    record.meta.verify(record.ids)
    expected.check(record)
    assert int(record.ids.max()) < expected.num_experts
    return True


def peak_of(case: Case) -> tuple[int, bool]:
    """Return the bytes that checking a case allocated at most, and its answer."""
    tracemalloc.start()
    try:
        answer = check(case)
        return tracemalloc.get_traced_memory()[1], answer
    finally:
        tracemalloc.stop()


def fuzz(numbers: Iterable[int], deadline: float) -> tuple[int, int]:
    """Check cases until they or the time run out; return how many, and how many were valid."""
    done = valid = 0
    for number in numbers:
        if time.monotonic() > deadline:
            break
        case = make_case(number)
        try:
            peak, answer = peak_of(case)
            most = limit(case[0], case[1])
            assert peak <= most, f"{peak} bytes for {size(case[0])}, at most {most}"
        except BaseException as error:
            error.add_note(f"case {number}: {type(case[0]).__name__}, {case[1:]}")
            raise
        done, valid = done + 1, valid + answer
    return done, valid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None)
    args = parser.parse_args()
    last = None if args.cases is None else args.first + args.cases
    numbers = itertools.islice(itertools.count(), args.first, last)
    done, valid = fuzz(numbers, time.monotonic() + args.seconds)
    print(f"{done} payloads: {valid} valid records, {done - valid} RecordErrors")


if __name__ == "__main__":
    main()
