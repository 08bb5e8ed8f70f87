"""Requests spread over ranks that step together."""

import math
import random
from contextlib import ExitStack

import pytest

from serve_app.deployments.ranks.choosing import Choice
from serve_app.types import GenerateRequest


def request(new: int = 16, session: str | None = None, prompt: int = 20) -> GenerateRequest:
    return GenerateRequest(input_ids=[1] * prompt, max_new_tokens=new, session=session)


def test_the_rank_that_samples_the_fewest_rollouts_is_next() -> None:
    choice = Choice(3)
    with ExitStack() as running:
        assert running.enter_context(choice.sampled(request(), 2)) == 0
        assert running.enter_context(choice.sampled(request(500))) == 1
        assert running.enter_context(choice.sampled(request(16))) == 2
        assert running.enter_context(choice.sampled(request())) == 2  # fewer tokens than rank 1
        with choice.sampled(request()) as rank:
            assert rank == 1
    with choice.sampled(request()) as rank:
        assert rank == 0


def test_a_session_stays_on_its_rank_however_busy() -> None:
    choice = Choice(2)
    with choice.sampled(request(session="a")) as home, choice.sampled(request()) as other:
        assert (home, other) == (0, 1)
        with choice.sampled(request(session="b")) as third, choice.sampled(request()):
            assert third == 0
            with choice.sampled(request(session="a")) as again:
                assert again == home
    with choice.sampled(request()), choice.sampled(request(session="a")) as later:
        assert later == home


def test_a_request_that_fails_is_counted_no_longer() -> None:
    choice = Choice(2)
    for _ in range(5):
        with pytest.raises(ValueError, match="0"), choice.sampled(request()) as rank:
            raise ValueError(rank)


def test_ranks_that_step_together_sample_equally_much() -> None:
    """16 clients, one request each at a time, lengths drawn log-uniformly from 16 to 512."""
    dice, choice, tokens = random.Random(7), Choice(2), [0, 0]
    stacks = [ExitStack() for _ in range(16)]
    left: list[list[int]] = []  # of each client: tokens to go, its rank

    def send(client: int) -> list[int]:
        length = int(math.exp(dice.uniform(math.log(16), math.log(512))))
        rank = stacks[client].enter_context(choice.sampled(request(length)))
        return [length, rank]

    left = [send(client) for client in range(16)]
    for _ in range(4000):
        for client, (_, rank) in enumerate(left):
            tokens[rank] += 1
            left[client][0] -= 1
        for client, (togo, _) in enumerate(left):
            if togo == 0:
                stacks[client].close()
                left[client] = send(client)
    assert max(tokens) <= 1.05 * min(tokens), tokens
