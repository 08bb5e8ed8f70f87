"""Drafted sequences: the rows of accepted tokens only, kept over preemption.

LMDeploy's real strategies, scheduler and answers; the steps are constructed (`drafted_steps`). No
engine with drafts has run on a GPU yet, so `SpeculativeConfig` stays refused. What holds without
drafts too is tested without them as well: there a step's rows wait.
"""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
import pytest

PROMPT = list(range(3, 12))
OTHER = list(range(40, 47))

Rows = npt.NDArray[Any]


def loop(keep: bool = True, **options: Any) -> Any:
    from serve_app.engines.lmdeploy.sequence import keep_rows
    from tests.lmdeploy.drafted_steps import Loop

    return Loop(keep_rows if keep else lambda _: None, **{"right": [0, 1, 2, 3], **options})


def checked(sequence: Any, loop: Any) -> Rows:
    """Return the passes in which an ended sequence's rows were captured.

    Every row must be that of the token in its place, and there is one for all but the last.
    """
    from tests.lmdeploy.drafted_steps import continued

    tokens = sequence.valid_ids.tolist()
    prompt = tokens[: sequence.prompt]
    assert tokens == continued(prompt, len(tokens) - len(prompt))
    rows: Rows = loop.answers[sequence.session_id].routed_experts
    assert rows.shape == (len(tokens) - 1, 2, 2)
    assert rows[:, 0, 1].tolist() == list(range(len(rows)))
    assert rows[:, 1, 0].tolist() == tokens[:-1]
    passes: Rows = rows[:, 0, 0]
    return passes


@pytest.mark.parametrize("right", [[0], [3], [0, 1, 2, 3], [3, 0]])
@pytest.mark.parametrize("ahead", [False, True])
def test_rows_are_those_of_accepted_tokens(right: list[int], ahead: bool) -> None:
    steps = loop(right=right)
    first, second = steps.add(1, PROMPT, 23), steps.add(2, OTHER, 17)
    steps.run(ahead)
    for one in (first, second):
        passes = checked(one, steps)
        assert all(a <= b for a, b in pairwise(passes))
        assert len(set(passes[: one.prompt])) == 1


@pytest.mark.parametrize("place", range(1, 9))
def test_a_stop_token_among_accepted_drafts_ends_the_rows(place: int) -> None:
    from tests.lmdeploy.drafted_steps import continued

    stop = continued(PROMPT, place)[-1]
    steps = loop(right=[3])
    sequence = steps.add(1, PROMPT, 40, stop=[stop])
    steps.run()
    assert sequence.valid_ids.tolist() == continued(PROMPT, place)
    checked(sequence, steps)
    assert steps.answers[1].finish


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("drafts", [0, 3])
def test_rows_outlive_the_blocks_of_their_sequence(drafts: int, ahead: bool) -> None:
    """A preempted sequence is processed again, and its rows are those of the first time."""
    passes = {}
    for keep in (True, False):
        steps = loop(keep, blocks=14, drafts=drafts)
        sequences = [steps.add(1, PROMPT, 28), steps.add(2, OTHER, 28)]
        steps.run(ahead)
        passes[keep] = [checked(one, steps) for one in sequences]
        if keep:
            assert sum(steps.kept.forget(one.session_id) for one in sequences) > 0
            assert not steps.kept.sequences
    for kept, lost in zip(passes[True], passes[False], strict=True):
        assert all(a <= b for a, b in pairwise(kept))
        assert (kept <= lost).all()
    assert any((kept < lost).any() for kept, lost in zip(passes[True], passes[False], strict=True))
    assert len({*passes[True][1][: len(OTHER)], *passes[True][0][: len(PROMPT)]}) == 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("drafts", [0, 3])
def test_rows_are_kept_while_a_long_sequence_is_processed_again_in_pieces(
    drafts: int, ahead: bool
) -> None:
    steps = loop(blocks=22, chunk=8, drafts=drafts)
    sequences = [steps.add(n, [n, *range(60 + n, 75 + n)], 30) for n in (1, 2)]
    steps.run(ahead)
    for one in sequences:
        passes = checked(one, steps)
        assert all(a <= b for a, b in pairwise(passes))
    assert sum(steps.kept.forget(one.session_id) for one in sequences) > 0


@pytest.mark.parametrize(("drafts", "blocks"), [(0, 5), (3, 4)])
def test_a_prefix_cache_gives_the_rows_of_whoever_captured_them(drafts: int, blocks: int) -> None:
    """Drafts need the hidden states of one block more, which is processed again."""
    steps = loop(prefix_caching=True, drafts=drafts)
    first = steps.add(1, PROMPT, 20)
    steps.run()
    passes = checked(first, steps)
    prompt = first.valid_ids[:22].tolist()
    steps.scheduler.end_session(1)
    second = steps.add(2, prompt, 9)
    steps.run()
    again = checked(second, steps)
    cached = second.cached_tokens
    assert cached == 4 * blocks
    assert again[:cached].tolist() == passes[:cached].tolist()
    assert again[cached] > passes.max()


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_aborted_sequence_has_shown_the_rows_of_what_it_answered(drafts: int) -> None:
    steps = loop(right=[2], drafts=drafts)
    sequence = steps.add(1, PROMPT, 40)
    steps.receive(steps.send(prefill=True))
    for _ in range(3):
        steps.receive(steps.send(prefill=False))
    answer = steps.answers[1]
    steps.scheduler.stop_session(1)
    answered = len(PROMPT) + len(answer.token_ids)
    assert answer.routed_experts.shape == (answered - 1, 2, 2)
    shown = answer.routed_experts[:, 1, 0].tolist()
    steps.scheduler.end_session(1)
    assert shown == sequence.history_cache.get_real()[: answered - 1].tolist()


def test_other_ways_of_decoding_are_refused() -> None:
    from lmdeploy.pytorch.strategies.dllm.sequence import DLLMSequenceStrategy

    from serve_app.engines.lmdeploy.sequence import keep_rows

    engine: Any = SimpleNamespace(seq_strategy=object.__new__(DLLMSequenceStrategy))
    with pytest.raises(ValueError, match="DLLMSequenceStrategy: their routes would be misread"):
        keep_rows(engine)


def test_speculative_config_is_refused_until_it_has_run_on_a_gpu() -> None:
    from serve_app.engines.lmdeploy.options import split_options

    with pytest.raises(ValueError, match=r"speculative_config cannot be set here: .* on a GPU"):
        split_options({"speculative_config": {"method": "qwen3_5_mtp"}})
