"""Sequences that keep the rows of what was sampled when their blocks are taken away.

Where blocks run out, LMDeploy frees those of a running sequence, truncates its recorded routes to
nothing and processes its tokens once more later. Its record would then hold the experts of that
second pass, not those that the tokens were sampled with: the earliest capture wins instead.
Where drafts are verified, only accepted tokens have rows: LMDeploy cuts those of rejected ones off
itself. Imports LMDeploy: load it with the engine only.
"""

from dataclasses import replace
from typing import Any

import numpy.typing as npt
from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.strategies.ar.sequence import ARSequenceStrategy, SchedulerSequenceDefault
from lmdeploy.pytorch.strategies.ar_spec.sequence import (
    ARSpecSequenceStrategy,
    SchedulerSequenceARSpec,
)

from serve_app.engines.lmdeploy.history import Backlog, RowHistory
from serve_app.records import Ids


class _Keeping:
    """What a sequence does to keep its rows; stands before LMDeploy's class of it."""

    recomputed = 0
    published: Any = None
    """The trie's node down to which every block has its rows."""

    def __post_init__(self: Any) -> None:
        self.all_routed_experts = RowHistory(more=self.sampling_param.max_new_tokens)
        super().__post_init__()  # type: ignore[misc]

    @property
    def kept(self: Any) -> Ids | None:
        """Rows that win over those that are computed again; None once these have caught up."""
        rows: Ids | None = self.all_routed_experts.kept
        return rows

    def set_step(self: Any, step: int) -> None:
        """Go back to ``step`` processed tokens; what was captured beyond is kept."""
        rows: RowHistory = self.all_routed_experts
        lost = self.return_routed_experts and len(rows) > step
        if lost and self.num_new_tokens > 0 and self.status != MessageStatus.STOPPED:
            rows.keep()
            self.recomputed += 1
        super().set_step(step)  # type: ignore[misc]

    def set_state(self: Any, state: Any) -> None:
        """Begin another part of its life; what was shown of its rows may be read at its end."""
        super().set_state(state)  # type: ignore[misc]
        if state.status is not MessageStatus.RUNNING:
            self.all_routed_experts.leave()

    @property
    def routed_experts(self: Any) -> npt.NDArray[Any] | None:
        """The rows so far, all but the newest token's; LMDeploy asks with every answer."""
        rows: RowHistory = self.all_routed_experts
        if rows.whole or self.return_routed_experts:
            return rows.shown(self.num_valid_ids - 1)
        return None


class KeepingSequence(_Keeping, SchedulerSequenceDefault):  # type: ignore[misc]
    """A sequence that is sampled token by token."""


class KeepingDraftedSequence(_Keeping, SchedulerSequenceARSpec):  # type: ignore[misc]
    """A sequence whose drafts are verified, several tokens a step."""


class _Sequences:
    """The sequences that a strategy has made, by session."""

    sequence: type[Any]

    def __init__(self) -> None:
        self.sequences: dict[int, Any] = {}
        self.backlog = Backlog()

    def make_sequence(self, seq_id: int, session: Any, **fields: Any) -> Any:
        """Make a sequence as LMDeploy does, of another class."""
        made = self.sequence(seq_id=seq_id, session=session, **fields)
        self.sequences[session.session_id] = made
        return made

    def forget(self, session_id: int) -> int:
        """Drop a finished session; return how often its tokens were computed again."""
        sequence = self.sequences.pop(session_id, None)
        if not self.sequences:
            self.backlog.clear()
        return 0 if sequence is None else sequence.recomputed


class KeepingStrategy(_Sequences, ARSequenceStrategy):  # type: ignore[misc]
    """Makes sequences that keep their rows, and gives them a decode step's all at once."""

    sequence = KeepingSequence

    def update_running(
        self, running: list[Any], batched_outputs: Any, model_inputs: Any, delta: Any
    ) -> None:
        """Add what a step sampled to its sequences."""
        rows = batched_outputs.all_routed_experts
        if model_inputs is None and rows is None:
            self.backlog.skip()
        elif model_inputs is None and delta.max_q_seqlen == 1:
            self.backlog.add(running, rows.numpy())
            batched_outputs = replace(batched_outputs, all_routed_experts=None)
        super().update_running(running, batched_outputs, model_inputs, delta)


class KeepingDraftedStrategy(_Sequences, ARSpecSequenceStrategy):  # type: ignore[misc]
    """Makes sequences that keep the rows of accepted tokens."""

    sequence = KeepingDraftedSequence


Keeping = KeepingStrategy | KeepingDraftedStrategy

_KEEPING: dict[type[Any], type[Keeping]] = {
    ARSequenceStrategy: KeepingStrategy,
    ARSpecSequenceStrategy: KeepingDraftedStrategy,
}


def keep_rows(engine: Engine) -> Keeping:
    """Let an engine that has not begun to serve make such sequences.

    Raises ValueError for the ones that decode in another way (diffusion): they record otherwise.
    """
    found = type(engine.seq_strategy)
    if found not in _KEEPING:
        raise ValueError(
            "expected an engine that samples token by token or verifies drafts, got sequences of"
            f" {found.__name__}: their routes would be misread"
        )
    strategy = _KEEPING[found]()
    engine.seq_strategy = engine.seq_meta.strategy = strategy
    publish_once(engine.scheduler.block_trie)
    return strategy


def publish_once(trie: Any) -> None:
    """Let a prefix cache look for rows that its blocks lack where there is a new block only.

    LMDeploy walks every sequence's blocks up to the first one in every step.
    """

    def publish(sequences: list[Any]) -> None:
        if trie.enabled:
            for sequence in sequences:
                if sequence.prefix_cache.trie_cursor is not sequence.published:
                    _publish(trie, sequence)

    trie.cache_routed_experts = publish


def _publish(trie: Any, sequence: Any) -> None:
    if not sequence.return_routed_experts:
        return
    node = newest = sequence.prefix_cache.trie_cursor
    complete = True
    while node is not None and node.parent is not None and node is not sequence.published:
        start = node.prefix_len - trie.block_size
        trie._try_cache_node_routed_experts(node, sequence, start, node.prefix_len)
        complete = complete and node.routed_experts is not None
        node = node.parent
    if complete:
        sequence.published = newest
