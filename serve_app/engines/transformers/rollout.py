"""One request while it is being sampled: its tokens, text and experts, and when it ends."""

from collections.abc import Collection
from dataclasses import dataclass
from math import isnan

from serve_app.engines.base import EngineChunk
from serve_app.engines.detokenizer import Decode, Detokenizer
from serve_app.engines.stop_strings import StopStrings
from serve_app.engines.stream import ChunkStream
from serve_app.engines.transformers.expert_rows import ExpertRows
from serve_app.engines.transformers.penalties import LogitRules, Penalties
from serve_app.engines.transformers.sampling import Sampler, Sampling
from serve_app.errors import RecordError
from serve_app.records import Record, make_record
from serve_app.types import FinishReason, GenerateRequest


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a rollout by itself. ``decode=None``: no tokenizer, so no text."""

    token_ids: Collection[int]
    strings: tuple[str, ...]
    include_token: bool
    max_new_tokens: int
    min_new_tokens: int
    decode: Decode | None


class Rollout:
    """P prompt tokens and what was sampled so far.

    The rows of ``experts`` are those of processed tokens: all but the last sampled one, once the
    prompt was processed. ``group`` is an id that several rollouts of one prompt may share.
    """

    def __init__(
        self,
        request: GenerateRequest,
        rules: StopRules,
        experts: ExpertRows | None,
        stream: ChunkStream,
        group: str | None = None,
    ) -> None:
        self.request_id = request.request_id
        self.group = group
        self.prompt = request.input_ids
        self.output: list[int] = []
        self.experts = experts
        self.stream = stream
        self.weight_version = 0
        self.sampler = _sampler(request, rules)
        self._rules = rules
        self._text = Detokenizer(rules.decode) if rules.decode is not None else None
        self._stops = StopStrings(rules.strings)

    def take(self, token: int, logprob: float) -> EngineChunk:
        """Add a sampled token; the chunk says whether it was the last one."""
        if isnan(logprob):
            return self.end("error", "the model's logits are not finite")
        stops = token in self._rules.token_ids
        if stops and not self._rules.include_token:
            return self.end("stop")
        self.output.append(token)
        self.sampler.took(token)
        text = self._feed_text(token)
        if not stops and not self._stops.found and len(self.output) < self._rules.max_new_tokens:
            return EngineChunk([token], [logprob], text, weight_version=self.weight_version)
        # The rest of the text may complete a stop string, so it decides about the reason too.
        text += self._finish_text()
        reason: FinishReason = "stop" if stops or self._stops.found else "length"
        return self._last_chunk([token], [logprob], text, reason)

    def end(self, reason: FinishReason, error: str | None = None) -> EngineChunk:
        """End between two tokens."""
        text = "" if error else self._finish_text()  # decoding may be what failed
        return self._last_chunk([], [], text, reason, error)

    def _feed_text(self, token: int) -> str:
        if self._text is None:
            return ""
        text = self._text.feed(token)
        early = len(self.output) < self._rules.min_new_tokens
        return text if early else self._stops.feed(text)

    def _finish_text(self) -> str:
        if self._text is None:
            return ""
        return self._stops.feed(self._text.finish()) + self._stops.finish()

    def _last_chunk(
        self,
        token_ids: list[int],
        logprobs: list[float],
        text: str,
        reason: FinishReason,
        error: str | None = None,
    ) -> EngineChunk:
        record = None
        if error is None:
            try:
                record = self._record()
            except RecordError as why:  # its own end, and not that of all others
                reason, error = "error", f"the routed experts that were recorded are none: {why}"
        return EngineChunk(
            token_ids=token_ids,
            logprobs=logprobs,
            text=text,
            finish_reason=reason,
            record=record,
            weight_version=self.weight_version,
            error=error,
        )

    def _record(self) -> Record | None:
        """P+G-1 rows for the G tokens that are returned; a stripped stop token isn't.

        Fewer when the prompt was not processed to its end.
        """
        if self.experts is None:
            return None
        rows = min(self.experts.rows, len(self.prompt) + len(self.output) - 1)
        if rows == 0:
            return None
        return make_record(
            self.experts.first(rows),
            num_experts=self.experts.num_experts,
            moe_layers=self.experts.moe_layers,
            weight_version=self.weight_version,
            tokens=(self.prompt + self.output)[:rows],
            repeats="ours",
        )


def _sampler(request: GenerateRequest, rules: StopRules) -> Sampler:
    sampling = Sampling(request.temperature, request.top_k, request.top_p, request.min_p)
    changes = LogitRules(
        repetition=request.repetition_penalty,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
        bias=request.logit_bias,
        banned=frozenset(rules.token_ids),
        min_tokens=rules.min_new_tokens,
    )
    penalties = None if changes.idle else Penalties(changes, request.input_ids)
    return Sampler(sampling, request.seed, penalties)
