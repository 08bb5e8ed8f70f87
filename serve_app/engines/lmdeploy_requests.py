"""Which requests LMDeploy can serve, and where each of them ends."""

from collections.abc import Iterable

from serve_app.engines.base import ModelInfo
from serve_app.engines.detokenizer import Decode
from serve_app.engines.lmdeploy_rollout import Rollout
from serve_app.engines.stream import ChunkStream
from serve_app.errors import InvalidRequest
from serve_app.types import GenerateRequest

SEED_RANGE = range(-(2**63), 2**64)


class RequestRules:
    """Checks requests against one model; ``decode=None``: it has no tokenizer."""

    def __init__(self, info: ModelInfo, eos_ids: frozenset[int], decode: Decode | None) -> None:
        self._info = info
        self._eos_ids = eos_ids
        self._decode = decode

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
        if request.stop and self._decode is None:
            raise InvalidRequest(
                "stop strings need the checkpoint's tokenizer, and it has none; use stop_token_ids"
            )
        if "" in request.stop:
            raise InvalidRequest("expected stop strings that are not empty, got ''")
        if request.seed is not None and request.seed not in SEED_RANGE:
            raise InvalidRequest(
                f"expected a seed in [{SEED_RANGE.start}, {SEED_RANGE.stop}), got {request.seed}"
            )

    def rollout(self, request: GenerateRequest, stream: ChunkStream, group: str | None) -> Rollout:
        """Return a checked request as a rollout that has not begun."""
        eos_ids = frozenset() if request.ignore_eos else self._eos_ids
        room = self._info.context_length - len(request.input_ids)
        return Rollout(
            request,
            stream,
            stop_ids=eos_ids.union(request.stop_token_ids),
            max_new_tokens=min(request.max_new_tokens, room),
            decode=self._decode,
            group=group,
        )

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(
                    f"expected {what} in [0, {self._info.vocab_size}), got {token}"
                )
