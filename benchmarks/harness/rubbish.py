"""Request bodies that no route can want: noise, cut JSON, depth, fields of odd values."""

import json
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    10**30,
    "",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    {},
    [None],
    {"a": {"b": []}},
    [-1],
    [10**20],
    "AQVsb2NhbA",
)


def rubbish(number: int) -> bytes:
    rng = random.Random(number)
    good: dict[str, Any] = {"input_ids": [5], "max_tokens": 2, "model": "policy"}
    good |= {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "key": "k"}
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            text = json.dumps(good).encode()
            return text[: rng.randrange(len(text))]
        case 2:
            return rng.choice([b"[" * 50_000, b'{"a":' * 5_000, b"1" * 9000, b"\xff" * 99])
        case _:
            for name in rng.sample(sorted(good), rng.randint(1, 4)):
                good[name] = rng.choice(_ODD)
            good[rng.choice(["stream", "n", "temperature", "stop", "seed"])] = rng.choice(_ODD)
            return json.dumps(good).encode()
