"""Sequences that keep the rows of what was sampled when their blocks are taken away.

Where blocks run out, LMDeploy frees those of a running sequence, truncates its recorded routes to
nothing and processes its tokens once more later. Its record would then hold the experts of that
second pass, not those that the tokens were sampled with: the earliest capture wins instead.
Imports LMDeploy: load it with the engine only.
"""

from typing import Any

from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.strategies.ar.sequence import ARSequenceStrategy, SchedulerSequenceDefault

from serve_app.records import Ids


class KeepingSequence(SchedulerSequenceDefault):  # type: ignore[misc]  # lmdeploy is untyped
    """Holds the rows of tokens that were sampled from, while they are computed again."""

    kept: Ids | None = None
    recomputed = 0

    def set_step(self, step: int) -> None:
        """Go back to ``step`` processed tokens; what was captured beyond is kept."""
        rows = self.all_routed_experts
        lost = self.return_routed_experts and len(rows) > step
        if lost and self.num_new_tokens > 0 and self.status != MessageStatus.STOPPED:
            captured = rows.get_real().copy()
            if self.kept is not None:
                both = min(len(captured), len(self.kept))
                captured[:both] = self.kept[:both]
            if self.kept is None or len(captured) > len(self.kept):
                self.kept = captured
            self.recomputed += 1
        super().set_step(step)

    def append_routed_experts(self, routed_experts: Any) -> None:
        """Add captured rows; those that are kept from before win."""
        start = len(self.all_routed_experts)
        super().append_routed_experts(routed_experts)
        if self.kept is None:
            return
        stop = min(len(self.all_routed_experts), len(self.kept))
        if start < stop:
            self.all_routed_experts[start:stop] = self.kept[start:stop]
        if stop == len(self.kept):
            self.kept = None


class KeepingStrategy(ARSequenceStrategy):  # type: ignore[misc]
    """Makes such sequences and counts, by session, how often each lost its blocks."""

    def __init__(self) -> None:
        self.sequences: dict[int, KeepingSequence] = {}

    def make_sequence(self, seq_id: int, session: Any, **fields: Any) -> Any:
        """Make a sequence as LMDeploy does, of another class."""
        sequence = KeepingSequence(seq_id=seq_id, session=session, **fields)
        self.sequences[session.session_id] = sequence
        return sequence

    def forget(self, session_id: int) -> int:
        """Drop a finished session; return how often its tokens were computed again."""
        sequence = self.sequences.pop(session_id, None)
        return 0 if sequence is None else sequence.recomputed


def keep_rows(engine: Engine) -> KeepingStrategy:
    """Let an engine that has not begun to serve make such sequences.

    Raises ValueError for the ones that decode in another way (drafts, diffusion): they record
    otherwise.
    """
    if type(engine.seq_strategy) is not ARSequenceStrategy:
        raise ValueError(
            "expected an engine that samples token by token, got sequences of"
            f" {type(engine.seq_strategy).__name__}: their routes would be misread"
        )
    strategy = KeepingStrategy()
    engine.seq_strategy = engine.seq_meta.strategy = strategy
    return strategy
