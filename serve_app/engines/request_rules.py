"""Which requests an engine can serve at all, told before anything is sampled."""

from collections.abc import Iterable

from serve_app.engines.base import ModelInfo
from serve_app.errors import InvalidRequest
from serve_app.types import GenerateRequest

SEED_RANGE = range(-(2**63), 2**64)
"""What a torch generator takes."""


class RequestRules:
    """Checks requests against one model; ``has_tokenizer`` is whether it makes text."""

    def __init__(self, info: ModelInfo, *, has_tokenizer: bool) -> None:
        self._info = info
        self._has_tokenizer = has_tokenizer

    def check(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a request that this model can never serve."""
        prompt, longest = request.input_ids, self._info.context_length
        if not prompt:
            raise InvalidRequest("expected at least one prompt token, got none")
        self._check_vocabulary("input_ids", (min(prompt), max(prompt)))
        self._check_vocabulary("stop_token_ids", request.stop_token_ids)
        self._check_vocabulary("logit_bias", request.logit_bias)
        if len(prompt) >= longest:
            raise InvalidRequest(
                f"expected at most {longest - 1} prompt tokens, one less than the context length"
                f" {longest}, got {len(prompt)}"
            )
        if request.stop and not self._has_tokenizer:
            raise InvalidRequest(
                "stop strings need the checkpoint's tokenizer, and it has none; use stop_token_ids"
            )
        if "" in request.stop:
            raise InvalidRequest("expected stop strings that are not empty, got ''")
        if request.seed is not None and request.seed not in SEED_RANGE:
            raise InvalidRequest(
                f"expected a seed in [{SEED_RANGE.start}, {SEED_RANGE.stop}), got {request.seed}"
            )

    def most_new_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a checked request may get: the context length ends it, too."""
        return min(request.max_new_tokens, self._info.context_length - len(request.input_ids))

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(
                    f"expected {what} in [0, {self._info.vocab_size}), got {token}"
                )
