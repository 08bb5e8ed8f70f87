"""Random conversations beside a naive reference: no row that is valid is ever another's.

Turns are put and resumed, edited, cut short, tokenised otherwise, sampled under new weights. What a
row's routes must be follows from what stands before it alone: each prefix of tokens that was ever
processed has routes of its own, of the capture that came first in the key's sequence.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import StoreArgs
from serve_app.continuing import put_continued
from serve_app.errors import PrefixMismatch
from serve_app.materialize import materialize
from serve_app.records import make_record
from serve_app.store.owner.memory import MemoryStore
from serve_app.types import BatchSpec, OnDivergence, RoutedSequence

LAYERS, TOP_K, EXPERTS = 2, 2, 16
Row = tuple[int, bytes]
"""The version of a row's weights, and its ids."""


class Elsewhere(MemoryStore):
    """A store whose records all lie on another node."""

    def is_local(self, key: str) -> bool:
        return False


def routes(prefix: tuple[int, ...], version: int) -> np.ndarray:
    """Ids ``[layers, top_k]`` of the row that ends a prefix, as these weights choose them."""
    rng = np.random.default_rng([version, len(prefix), *prefix])  # zeros at the end count for none
    return np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)])


@dataclass
class Turn:
    """A key, and what is true of it: its tokens, and each row's version and ids."""

    key: str
    tokens: list[int]
    rows: list[Row]


@dataclass
class Conversation:
    """All turns so far; ``weights`` is the version that samples now."""

    store: MemoryStore
    turns: list[Turn] = field(default_factory=list)
    weights: int = 0

    def put(
        self, tokens: list[int], start: int, parent: Turn | None, mode: OnDivergence
    ) -> Turn | None:
        """Put the rows of ``tokens`` from ``start`` on; None where it is refused, and rightly."""
        whole = [routes(tuple(tokens[: row + 1]), self.weights) for row in range(len(tokens))]
        record = make_record(
            np.stack(whole[start:]),
            num_experts=EXPERTS,
            start=start,
            weight_version=self.weights,
            tokens=tokens[start:],
        )
        mine: list[Row] = [(self.weights, ids.astype(np.uint8).tobytes()) for ids in whole]
        if parent is None:
            return Turn(self.store.put(record), tokens, mine)
        common = next(
            (n for n, (a, b) in enumerate(zip(tokens, parent.tokens, strict=False)) if a != b),
            min(len(tokens), len(parent.tokens)),
        )
        parts = common < min(len(tokens), len(parent.tokens))
        if parts and mode == "raise":
            where = (
                f"position {common}: expected token {parent.tokens[common]},.* got {tokens[common]}"
            )
            with pytest.raises(PrefixMismatch, match=where):
                put_continued(self.store, record, parent.key, mode)
            return None
        put = put_continued(self.store, record, parent.key, mode)
        if mode == "prefix":
            assert put.rows == common
            return Turn(put.key, tokens, parent.rows[:common] + mine[common:])
        longer = max(tokens, parent.tokens, key=len)
        return Turn(put.key, longer, parent.rows + mine[len(parent.rows) :])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    kind = draw(st.sampled_from([MemoryStore, Elsewhere]))
    talk = Conversation(kind("talk", StoreArgs(backend="memory")))
    vocabulary = st.integers(0, 3)
    for _ in range(draw(st.integers(1, 8))):
        talk.weights += draw(st.integers(0, 1))
        if not talk.turns or (draw(st.booleans()) and draw(st.booleans())):
            tokens = draw(st.lists(vocabulary, min_size=1, max_size=8))
            first = talk.put(tokens, 0, None, "raise")
            assert first is not None
            talk.turns.append(first)
            continue
        parent = draw(st.sampled_from(talk.turns))
        tokens = list(parent.tokens)
        if draw(st.booleans()):  # edited, or tokenised otherwise
            at = draw(st.integers(0, len(tokens) - 1))
            tokens[at : at + draw(st.integers(0, 2))] = draw(st.lists(vocabulary, max_size=2))
        if draw(st.booleans()) and draw(st.booleans()):  # cut short
            tokens = tokens[: draw(st.integers(0, len(tokens)))]
        tokens += draw(st.lists(vocabulary, max_size=4))
        if not tokens:
            continue
        start = draw(st.sampled_from([0, min(len(tokens) - 1, len(parent.tokens))]))
        same = tokens[:start] == parent.tokens[:start]  # rows that are not sent are the parent's
        mode: OnDivergence = draw(st.sampled_from(["raise", "prefix"]))
        turn = talk.put(tokens, start if same else 0, parent, mode)
        if turn is not None:
            talk.turns.append(turn)
    return talk


@given(talk=conversations())
def test_no_wrong_row_is_ever_valid(talk: Conversation) -> None:
    sequences = [RoutedSequence(turn.key, len(turn.tokens) + 1) for turn in talk.turns]
    batch = materialize(talk.store, sequences, BatchSpec(tracks=("tokens",)))
    assert batch.tokens is not None
    for turn, (begin, end) in zip(talk.turns, pairwise(batch.cu_seqlens.tolist()), strict=True):
        rows = slice(begin, end - 1)
        assert batch.valid[rows].all()
        assert not batch.valid[end - 1]
        assert batch.tokens[rows].tolist() == turn.tokens
        found = [
            (batch.versions[number], ids.tobytes())
            for number, ids in zip(batch.version_of[rows], batch.ids[rows], strict=True)
        ]
        assert found == turn.rows


@given(talk=conversations(), data=st.data())
def test_a_release_takes_no_other_turn_along(talk: Conversation, data: st.DataObject) -> None:
    kept = data.draw(st.sampled_from(talk.turns))
    talk.store.release([turn.key for turn in talk.turns if turn is not kept])
    (chain,) = talk.store.fetch([kept.key])
    assert isinstance(chain, list)
    batch = materialize(talk.store, [RoutedSequence(kept.key, len(kept.tokens))])
    assert [ids.tobytes() for ids in batch.ids] == [ids for _, ids in kept.rows]
    talk.store.release([kept.key])
    assert talk.store.stats().live_bytes == 0
