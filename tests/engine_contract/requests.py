"""What the tests of the contract ask an engine for."""

from typing import Any

from serve_app.types import GenerateRequest

PROMPT = [10, 200, 33, 47, 5, 90, 121]
NEW = 6  # every family runs all of this: steps are what it costs
LONG = 1500  # more tokens than any engine samples before a test ends it


def varied(**fields: Any) -> GenerateRequest:
    """Sampled, yet always the same: some small models repeat themselves when greedy."""
    return request(**{"temperature": 1.0, "seed": 3, **fields})


def request(**fields: Any) -> GenerateRequest:
    """Greedy, recorded, `NEW` tokens, no EOS."""
    defaults: dict[str, Any] = {
        "input_ids": PROMPT,
        "max_new_tokens": NEW,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_routed_experts": True,
    }
    return GenerateRequest(**{**defaults, **fields})


def mixed_requests(count: int) -> list[GenerateRequest]:
    """Greedy requests of many lengths, more than there are slots."""
    return [
        request(
            input_ids=[(7 * i + 11 * j) % 250 + 3 for j in range(1 + 5 * i % 37)],
            max_new_tokens=2 + i % 5 * 3,
        )
        for i in range(count)
    ]
