"""Sampling: what is picked, how often, and that neighbours don't matter."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from serve_app.engines.transformers.penalties import LogitRules, Penalties
from serve_app.engines.transformers.sampling import Sampler, Sampling, sample

PROBABILITIES = [0.4, 0.3, 0.2, 0.1]
LOGITS = torch.tensor(PROBABILITIES).log()


def draw(sampling: Sampling, times: int = 4000, seed: int = 0) -> dict[int, float]:
    """Return how often each token came, sampled in one batch of many seeds."""
    samplers = [Sampler(sampling, seed + index) for index in range(times)]
    tokens, _ = sample(LOGITS.expand(times, -1), samplers)
    return {token: count / times for token, count in sorted(Counter(tokens).items())}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(top_k=2), [4 / 7, 3 / 7]),
        (Sampling(top_k=100), PROBABILITIES),
        (Sampling(top_p=0.65), [4 / 7, 3 / 7]),
        (Sampling(top_p=0.75), [4 / 9, 3 / 9, 2 / 9]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 3 / 7]),  # of what top-k left: 4/9, 3/9, 2/9
        (Sampling(top_k=1), [1.0]),
        (Sampling(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampling(temperature=0), [1.0]),
        (Sampling(temperature=1e-30), [1.0]),
    ],
)
def test_frequencies(sampling: Sampling, expected: list[float]) -> None:
    found = draw(sampling)
    assert list(found) == list(range(len(expected)))
    assert list(found.values()) == pytest.approx(expected, abs=0.03)


def test_ties_at_the_edge_of_top_k_are_cut() -> None:
    tokens = [sample(torch.zeros(1, 50), [Sampler(Sampling(top_k=3), i)])[0][0] for i in range(200)]
    assert len(set(tokens)) == 3


def test_logprobs_are_raw_and_in_fp32() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    samplers = [
        Sampler(Sampling(temperature=0.3, top_k=5), 0),
        Sampler(Sampling(top_p=0.5), 0),
        Sampler(Sampling(temperature=0), 0),
    ]
    tokens, logprobs = sample(logits, samplers)
    expected = logits.float().log_softmax(-1)[torch.arange(3), tokens]
    assert logprobs == expected.tolist()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(2))
    settings = [Sampling(), Sampling(temperature=0), Sampling(top_k=7), Sampling(0.7, 0, 0.9)]
    together, alone = (
        [Sampler(setting, index) for index, setting in enumerate(settings)] for _ in range(2)
    )
    for _ in range(5):
        tokens, logprobs = sample(logits, together)
        for row in range(4):
            assert sample(logits[row : row + 1], [alone[row]]) == ([tokens[row]], [logprobs[row]])


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(500, -1)
    for sampling in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.99)):
        tokens, logprobs = sample(logits, [Sampler(sampling, seed) for seed in range(500)])
        assert set(tokens) == {1, 3}
        assert logprobs == pytest.approx([math.log(0.5)] * 500)


def test_logits_that_are_not_finite_show_in_their_row_alone() -> None:
    logits = torch.zeros(4, 10)
    logits[0, 3], logits[1, 4] = math.nan, math.inf
    samplers = [Sampler(sampling, 0) for sampling in (Sampling(), Sampling(top_k=2)) * 2]
    tokens, logprobs = sample(logits, samplers)
    assert [math.isnan(logprob) for logprob in logprobs] == [True, True, False, False]
    assert all(0 <= token < 10 for token in tokens)


def test_large_vocabularies_reach_their_last_tokens() -> None:
    samplers = [Sampler(Sampling(), seed) for seed in range(400)]
    tokens = [sample(torch.zeros(1, 150_000), [sampler])[0][0] for sampler in samplers]
    assert max(tokens) > 145_000
    assert min(tokens) < 5_000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(min_p=0.6), [4 / 7, 3 / 7]),  # of 0.4: 0.24
        (Sampling(min_p=0.45), [4 / 9, 3 / 9, 2 / 9]),
        (Sampling(min_p=1.0), [1.0]),
        (Sampling(temperature=0.5, min_p=0.45), [16 / 25, 9 / 25]),  # after temperature
        (Sampling(top_p=0.95, min_p=0.3), [4 / 9, 3 / 9, 2 / 9]),
        (Sampling(top_p=0.6, min_p=0.6), [4 / 7, 3 / 7]),  # top-p of what min-p left
    ],
)
def test_min_p_frequencies(sampling: Sampling, expected: list[float]) -> None:
    found = draw(sampling)
    assert list(found.values()) == pytest.approx(expected, abs=0.03)


def penalised(rules: LogitRules, logits: list[float], prompt: list[int], output: list[int]) -> Any:
    penalties = Penalties(rules, prompt)
    for token in output:
        penalties.took(token)
    given = torch.tensor(logits)
    changed = penalties.apply(given)
    assert given.tolist() == logits
    return changed.tolist()


def test_repetition_penalty_is_the_formula_of_ctrl() -> None:
    """Positive logits are divided, negative ones multiplied, once, prompt and output alike."""
    logits = [2.0, -1.0, 0.5, -0.5, 1.0]
    found = penalised(LogitRules(repetition=2.0), logits, prompt=[0, 0, 1], output=[3, 3])
    assert found == [1.0, -2.0, 0.5, -1.0, 1.0]


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    rules = LogitRules(presence=0.5, frequency=0.25)
    found = penalised(rules, [1.0] * 4, prompt=[0, 0], output=[1, 2, 2])
    assert found == [1.0, 1.0 - 0.5 - 0.25, 1.0 - 0.5 - 0.5, 1.0]


def test_penalties_follow_bias_and_ban() -> None:
    rules = LogitRules(
        repetition=2.0, presence=1.0, bias={1: 3.0, 2: -4.0}, banned=frozenset({3}), min_tokens=2
    )
    assert penalised(rules, [1.0] * 4, [], [1]) == [1.0, 4 / 2 - 1, -3.0, -math.inf]
    assert penalised(rules, [1.0] * 4, [], [1, 1]) == [1.0, 4 / 2 - 1, -3.0, 1.0]


def test_a_bias_decides_and_logprobs_stay_raw() -> None:
    penalties = [Penalties(LogitRules(bias={2: 50.0}), []) for _ in range(2)]
    samplers = [
        Sampler(Sampling(), 0, penalties[0]),
        Sampler(Sampling(temperature=0), 0, penalties[1]),
        Sampler(Sampling(temperature=0), 0),
    ]
    logits = LOGITS.expand(3, -1)
    tokens, logprobs = sample(logits, samplers)
    assert tokens == [2, 2, 0]
    assert logprobs == pytest.approx([math.log(0.2), math.log(0.2), math.log(0.4)])
    torch.testing.assert_close(logits, LOGITS.expand(3, -1))


def test_rules_that_change_nothing_cost_nothing() -> None:
    assert LogitRules(banned=frozenset({1})).idle
    assert not LogitRules(banned=frozenset({1}), min_tokens=1).idle
    assert not LogitRules(frequency=0.1).idle
