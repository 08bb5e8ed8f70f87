"""What each deployment exports and logs; names, labels and meaning are in docs/metrics.md."""

import functools
from collections import Counter
from dataclasses import dataclass

from serve_app.errors import R3Error
from serve_app.observe.event_log import log_event
from serve_app.observe.instruments import Instrument, Instruments, after_answering
from serve_app.store.keys import shorten
from serve_app.types import GenerateResult, WeightsResult

ENGINE = {
    "r3serve_engine_rollouts_total": Instrument(
        "counter", "Rollouts that ended.", ("finish_reason",)
    ),
    "r3serve_engine_prompt_tokens_total": Instrument("counter", "Prompt tokens of them."),
    "r3serve_engine_output_tokens_total": Instrument("counter", "Tokens sampled in them."),
    "r3serve_engine_routed_rows_total": Instrument(
        "counter", "Rows that their keys or arrays read as."
    ),
    "r3serve_engine_without_routes_total": Instrument(
        "counter", "Rollouts that asked for routes and got none.", ("reason",)
    ),
    "r3serve_engine_rollout_seconds": Instrument(
        "seconds", "From a request's arrival at the replica to its key."
    ),
    "r3serve_engine_weight_version": Instrument("gauge", "Version that the replica samples with."),
    "r3serve_engine_weight_update_seconds": Instrument("seconds", "Time to take new weights."),
}
RANKS = {
    "r3serve_rank_output_tokens_total": Instrument(
        "counter", "Tokens sampled by each rank of an engine group.", ("rank",)
    ),
}
DECODER = {
    "r3serve_decoder_answers_total": Instrument("counter", "Batches answered."),
    "r3serve_decoder_answer_bytes_total": Instrument("counter", "Bytes of ids in them."),
    "r3serve_decoder_sequences_total": Instrument("counter", "Sequences in them."),
    "r3serve_decoder_masked_rows_total": Instrument(
        "counter", "Rows that had no routes and route natively.", ("reason",)
    ),
    "r3serve_decoder_refused_total": Instrument(
        "counter", "Calls that ended with an error.", ("error",)
    ),
    "r3serve_decoder_materialize_seconds": Instrument("seconds", "From keys to an answer."),
}
STORE = {
    "r3serve_store_shards": Instrument("gauge", "Shards that have a name now."),
}


@dataclass(frozen=True, slots=True)
class DecoderAnswer:
    """What is told of a materialized batch: its ids' size, and how long it took."""

    nbytes: int
    sequences: int
    masked: Counter[str]
    seconds: float


class EngineMetrics:
    """Reports the rollouts and weights of one engine replica."""

    def __init__(self) -> None:
        self._instruments = Instruments(ENGINE)

    def finished(self, result: GenerateResult, seconds: float) -> None:
        """Report one rollout, once it is answered; on the event loop."""
        after_answering(functools.partial(self._finished, result, seconds))

    def _finished(self, result: GenerateResult, seconds: float) -> None:
        report = self._instruments
        report.count("r3serve_engine_rollouts_total", finish_reason=result.finish_reason)
        report.count("r3serve_engine_prompt_tokens_total", result.prompt_tokens)
        report.count("r3serve_engine_output_tokens_total", len(result.output_ids))
        report.count("r3serve_engine_routed_rows_total", result.num_routed_tokens)
        report.took("r3serve_engine_rollout_seconds", seconds)
        why = result.routed_experts_error
        if why is not None:
            # The error's name, where one was raised; else a sentence, and those are no label.
            name = why.partition(":")[0]
            report.count(
                "r3serve_engine_without_routes_total",
                reason=name if name.isidentifier() else result.finish_reason,
            )
        key = result.routed_experts
        log_event(
            "rollout",
            rollout=result.request_id[:64],
            finish_reason=result.finish_reason,
            prompt_tokens=result.prompt_tokens,
            output_tokens=len(result.output_ids),
            rows=result.num_routed_tokens,
            key=shorten(key) if isinstance(key, str) else None,
            without_routes=why,
            weight_version=result.weight_version,
            seconds=round(seconds, 4),
        )

    def took_weights(self, result: WeightsResult) -> None:
        """Report new weights."""
        self._instruments.set("r3serve_engine_weight_version", result.version)
        self._instruments.took("r3serve_engine_weight_update_seconds", result.seconds)
        log_event("weights", version=result.version, seconds=round(result.seconds, 3))


class RankMetrics:
    """Reports what the ranks of one engine group sample; ``tokens`` of each so far."""

    def __init__(self) -> None:
        self._instruments = Instruments(RANKS)
        self.tokens = Counter[int]()

    def sampled(self, rank: int, tokens: int) -> None:
        """Report tokens that a rank has sampled."""
        self.tokens[rank] += tokens
        self._instruments.count("r3serve_rank_output_tokens_total", tokens, rank=f"{rank}")


class DecoderMetrics:
    """Reports the answers of one decoder replica."""

    def __init__(self) -> None:
        self._instruments = Instruments(DECODER)

    def answered(self, answer: DecoderAnswer) -> None:
        """Report one batch, once it is answered; on the event loop."""
        after_answering(functools.partial(self._answered, answer))

    def _answered(self, answer: DecoderAnswer) -> None:
        report = self._instruments
        report.count("r3serve_decoder_answers_total")
        report.count("r3serve_decoder_answer_bytes_total", answer.nbytes)
        report.count("r3serve_decoder_sequences_total", answer.sequences)
        report.took("r3serve_decoder_materialize_seconds", answer.seconds)
        masked = answer.masked
        for reason, rows in masked.items():
            report.count("r3serve_decoder_masked_rows_total", rows, reason=reason)
        log_event(
            "materialized",
            sequences=answer.sequences,
            nbytes=answer.nbytes,
            masked_rows=masked.total(),
            seconds=round(answer.seconds, 4),
        )

    def refused(self, error: R3Error) -> None:
        """Report a call that ended with an error."""
        self._instruments.count("r3serve_decoder_refused_total", error=type(error).__name__)
        log_event("refused", error=type(error).__name__, why=str(error)[:300])


class StoreMetrics:
    """Reports what the store deployment supervises; each shard reports itself."""

    def __init__(self) -> None:
        self._instruments = Instruments(STORE)

    def supervises(self, shards: int) -> None:
        """Report how many shards there are."""
        self._instruments.set("r3serve_store_shards", shards)
