"""Rows that wait are found wherever LMDeploy looks for them, and are those it would have found."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve_app.records import Ids

LAYERS, TOP_K = 3, 2


class Asking:
    """As much of a sequence as the backlog sees, and beside it what LMDeploy does by itself."""

    def __init__(self) -> None:
        from lmdeploy.pytorch.messages import HistoryRouterExperts, MessageStatus

        from serve_app.engines.lmdeploy.history import RowHistory

        self.all_routed_experts: Any = RowHistory()
        self.theirs: Any = HistoryRouterExperts()
        self.return_routed_experts = True
        self._state: Any = SimpleNamespace(status=MessageStatus.RUNNING)

    @property
    def status(self) -> Any:
        return self._state.status

    def change(self, status: Any) -> None:
        from lmdeploy.pytorch.messages import MessageStatus

        self._state = SimpleNamespace(status=status)
        if status is not MessageStatus.RUNNING:
            self.all_routed_experts.leave()

    def append(self, rows: Ids) -> None:
        self.all_routed_experts.append(rows)
        self.theirs.append(rows)


def some_rows(rng: random.Random, count: int) -> Ids:
    values = [rng.randrange(1 << 16) for _ in range(count * LAYERS * TOP_K)]
    return np.array(values, np.uint16).reshape(count, LAYERS, TOP_K)


def look(one: Asking, shown: list[tuple[Ids, Ids]]) -> None:
    """All that LMDeploy asks of a sequence's rows gives what its own would."""
    ours, theirs = one.all_routed_experts, one.theirs
    assert len(ours) == len(theirs)
    assert np.array_equal(ours.get_real(), theirs.get_real())
    for view, wanted in shown:
        assert np.array_equal(view, wanted)


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_those_that_lmdeploy_would_have(seed: int) -> None:
    from lmdeploy.pytorch.messages import MessageStatus

    from serve_app.engines.lmdeploy.history import Backlog

    rng, backlog = random.Random(seed), Backlog()
    sequences = [Asking() for _ in range(5)]
    sequences[-1].return_routed_experts = False
    for one in sequences:
        one.append(some_rows(rng, rng.randrange(1, 70)))
    shown: list[list[tuple[Ids, Ids]]] = [[] for _ in sequences]
    running = list(sequences)
    for _ in range(400):
        if rng.random() < 0.05:
            running = rng.sample(sequences, rng.randrange(1, 6))
        rows = some_rows(rng, len(running))
        backlog.add(running, rows)
        for place, one in enumerate(running):
            wanted = one.return_routed_experts and one.status is MessageStatus.RUNNING
            if wanted:
                one.theirs.append(rows[place : place + 1])
        for number, one in enumerate(sequences):
            end = len(one.theirs) - rng.randrange(3)
            view = one.all_routed_experts.shown(end)
            if view is not None:
                shown[number].append((view, one.theirs.get_real()[:end].copy()))
            what = rng.random()  # most steps pass with nobody looking
            if what < 0.02:
                look(one, shown[number])
            elif what < 0.03:
                size = rng.randrange(len(one.theirs) + 1)
                one.all_routed_experts.resize(size)
                one.theirs.resize(size)
            elif what < 0.04:
                one.append(some_rows(rng, rng.randrange(1, 90)))
            elif what < 0.05:
                ended = one.status is MessageStatus.STOPPED
                one.change(MessageStatus.RUNNING if ended else MessageStatus.STOPPED)
            elif what < 0.055:
                backlog.skip()
                one.theirs.append(missed := some_rows(rng, 1))
                one.all_routed_experts.append(missed)
    for one, views in zip(sequences, shown, strict=True):
        look(one, views)


def test_the_earliest_capture_of_a_row_wins() -> None:
    from serve_app.engines.lmdeploy.history import Backlog

    rng, backlog, one = random.Random(1), Backlog(), Asking()
    first, second = some_rows(rng, 40), some_rows(rng, 44)
    one.append(first[:30])
    for row in first[30:]:
        backlog.add([one], row[None])
    one.all_routed_experts.keep()
    one.all_routed_experts.resize(0)
    one.append(second[:10])
    one.all_routed_experts.keep()  # again, before it had caught up
    one.all_routed_experts.resize(0)
    one.append(second[:38])
    for row in second[38:]:
        backlog.add([one], row[None])
    wanted = np.concatenate([first, second[40:]])
    assert one.all_routed_experts.get_real().tolist() == wanted.tolist()


def held(rows: Any) -> int:
    """How many steps a sequence's history keeps in memory."""
    steps, count = rows._steps, 0
    while steps is not None:
        count += len(steps.arrays)
        steps = steps.later
    return count


def test_what_waits_is_bounded() -> None:
    from serve_app.engines.lmdeploy.history import MOST_WAITING, Backlog

    rng, backlog = random.Random(2), Backlog()
    ones = [Asking(), Asking()]
    for step in range(10 * MOST_WAITING):
        running = ones if step % 7 else ones[:1]
        backlog.add(running, some_rows(rng, len(running)))
        for one in ones:
            rows = one.all_routed_experts
            assert rows.waiting <= 2 * MOST_WAITING
            assert held(rows) <= 3 * MOST_WAITING


def test_a_sequence_that_ends_holds_no_step() -> None:
    from lmdeploy.pytorch.messages import MessageStatus

    from serve_app.engines.lmdeploy.history import Backlog

    rng, backlog = random.Random(3), Backlog()
    ones = [Asking(), Asking()]
    for _ in range(5):
        backlog.add(ones, some_rows(rng, 2))
    ones[0].change(MessageStatus.STOPPED)
    for _ in range(5):
        backlog.add(ones, some_rows(rng, 2))
    assert [held(one.all_routed_experts) for one in ones] == [0, 10]
    assert [len(one.all_routed_experts) for one in ones] == [5, 10]


def test_rows_are_not_shown_where_one_is_missing() -> None:
    from serve_app.engines.lmdeploy.history import Backlog

    rng, backlog, one = random.Random(4), Backlog(), Asking()
    rows = one.all_routed_experts
    assert rows.shown(1) is None
    one.append(some_rows(rng, 3))
    for end in range(4, 9):
        backlog.add([one], some_rows(rng, 1))
        assert len(rows.shown(end)) == end
    backlog.skip()
    assert rows.shown(9) is None
    backlog.add([one], some_rows(rng, 1))
    assert rows.shown(10) is None


def test_a_step_of_another_size_is_an_error() -> None:
    from serve_app.engines.lmdeploy.history import Backlog

    with pytest.raises(RuntimeError, match="the routes of 1 tokens of a decode step, got 2"):
        Backlog().add([Asking()], np.zeros((2, LAYERS, TOP_K), np.uint16))


def test_a_prefix_cache_is_looked_through_once_a_block() -> None:
    from serve_app.engines.lmdeploy.sequence import publish_once

    nodes: list[Any] = [SimpleNamespace(parent=None, prefix_len=0, routed_experts=None)]
    for number in range(1, 4):
        node = SimpleNamespace(parent=nodes[-1], prefix_len=4 * number, routed_experts=None)
        nodes.append(node)
    looked: list[int] = []
    captured = 8

    def cache(node: Any, sequence: Any, start: int, end: int) -> None:
        looked.append(end)
        if end <= captured:
            node.routed_experts = (start, end)

    trie: Any = SimpleNamespace(enabled=True, block_size=4, _try_cache_node_routed_experts=cache)
    publish_once(trie)
    sequence: Any = SimpleNamespace(
        prefix_cache=SimpleNamespace(trie_cursor=nodes[2]),
        published=None,
        return_routed_experts=True,
    )
    for cursor, more, wanted in (
        (nodes[2], 8, [8, 4]),
        (nodes[2], 8, []),
        (nodes[3], 8, [12]),
        (nodes[3], 12, [12]),
        (nodes[3], 12, []),
    ):
        sequence.prefix_cache.trie_cursor, captured = cursor, more
        looked.clear()
        trie.cache_routed_experts([sequence])
        assert looked == wanted
    assert [node.routed_experts for node in nodes[1:]] == [(0, 4), (4, 8), (8, 12)]
