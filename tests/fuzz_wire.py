"""Throws damaged and hostile payloads at every decoder: ``python -m tests.fuzz_wire --seconds 60``.

Every case ends with a `RecordError` or a valid record, and takes memory in proportion to its
payload; and no row of a record that repeats an expert is valid. A case is reproduced by its number:
``--first N --cases 1``.
"""

import argparse
import itertools
import random
import time
import tracemalloc
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from serve_app.errors import RecordError
from serve_app.records import Record, checksum, make_record
from serve_app.wire.expected import Expected
from serve_app.wire.registry import FORMATS, FormatName, decode, encode
from tests.damaged_payloads import damaged
from tests.distinct_ids import distinct_ids

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
        distinct_ids((rows, layers, top_k), experts, seed=rng.getrandbits(32)),
        num_experts=experts,
        start=start,
        moe_layers=moe,
        valid=valid,
    )
    known = rng.choice((None, rows))
    return record, Expected(layers, top_k, experts, moe, known, rng.choice((0, start)))


def repeated(rng: Random, record: Record) -> Record:
    """Return a record as of a peer that does not look: some rows repeat an expert and are valid."""
    ids = record.ids.copy()
    rows = rng.sample(range(len(ids)), rng.randint(1, min(len(ids), 20)))
    layers = rng.choice((record.moe_layers, (rng.choice(record.moe_layers),)))
    filling = rng.choice((0, record.num_experts - 1, rng.randrange(record.num_experts)))
    ids[np.ix_(rows, layers)] = filling
    return Record(record.meta._replace(checksum=checksum(ids)), ids)


def payload_of(rng: Random, record: Record) -> tuple[Any, FormatName]:
    name = rng.choice(tuple(FORMATS))
    try:
        return encode(record, name), name
    except RecordError:
        return encode(record, "r3serve"), "r3serve"


def make_case(number: int) -> Case:
    rng = Random(number)
    record, expected = whole_case(rng)
    repeats = rng.random() < 0.2
    if repeats:
        record = repeated(rng, record)
        expected = replace(expected, repeats=rng.choice(("mask", "mask", "refuse")))
    payload, name = payload_of(rng, record)
    if rng.random() < (0.5 if repeats else 0.9):
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
    chosen = np.sort(record.ids[:, list(record.moe_layers)][record.valid], axis=-1)
    assert (chosen[..., 1:] > chosen[..., :-1]).all()
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
