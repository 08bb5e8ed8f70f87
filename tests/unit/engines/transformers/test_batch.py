"""The batch, step by step: what a long prompt costs the others, and what an abort gives back."""

import asyncio

import pytest

from examples.tiny_moe import write_checkpoint
from serve_app.config import EngineArgs
from serve_app.engines.base import EngineChunk
from serve_app.engines.stream import ChunkStream
from serve_app.engines.transformers.batch import PIECE, Batch
from serve_app.engines.transformers.checkpoint import load_checkpoint
from serve_app.engines.transformers.expert_rows import ExpertRows
from serve_app.engines.transformers.recording import ExpertRecorder
from serve_app.engines.transformers.rollout import Rollout, StopRules
from serve_app.engines.transformers.runner import ModelRunner
from serve_app.types import GenerateRequest

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = [(7 * i) % 250 + 3 for i in range(3 * PIECE + 10)]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = write_checkpoint(
        tmp_path_factory.mktemp("tiny"), hidden=32, layers=2, experts=8, top_k=2
    )
    args = EngineArgs(model=str(path), dtype="float32", enable_return_routed_experts=True)
    checkpoint = load_checkpoint(args)
    return ModelRunner(checkpoint.model, ExpertRecorder(checkpoint.blocks))


class Steps:
    """A batch that is stepped by hand; ``chunks[request_id]`` is what came out so far."""

    def __init__(self, runner: ModelRunner, max_size: int) -> None:
        self.chunks: dict[str, list[EngineChunk]] = {}
        self.batch = Batch(runner, max_size=max_size, emit=self._keep)

    def _keep(self, rollout: Rollout, chunk: EngineChunk) -> None:
        self.chunks.setdefault(rollout.request_id, []).append(chunk)

    def add(self, name: str, prompt: list[int], new: int = 50, group: int = 1) -> None:
        self.batch.add([self._rollout(f"{name}{i or ''}", prompt, new) for i in range(group)])

    def _rollout(self, name: str, prompt: list[int], new: int) -> Rollout:
        rules = StopRules((), (), True, new, 0, None)
        experts = ExpertRows(layers=2, moe_layers=(0, 1), top_k=2, num_experts=8, capacity=16)
        wanted = GenerateRequest(request_id=name, input_ids=prompt, temperature=0)
        return Rollout(wanted, rules, experts, ChunkStream(asyncio.Event()))

    def tokens(self) -> dict[str, int]:
        return {
            name: sum(len(chunk.token_ids) for chunk in chunks)
            for name, chunks in self.chunks.items()
        }

    def end(self) -> None:
        self.batch.abort(lambda _: True)
        assert self.batch.idle


async def test_a_long_prompt_stalls_nobody_for_longer_than_a_piece(runner: ModelRunner) -> None:
    steps = Steps(runner, max_size=3)
    steps.add("short", [5, 6])
    steps.batch.step()
    assert steps.tokens() == {"short": 2}
    steps.add("long", LONG)
    steps.add("after", [5, 6])
    for step in range(3):
        steps.batch.step()
        assert steps.tokens() == {"short": 3 + step}
    steps.batch.step()  # the last 10 tokens, and the one behind it in the queue
    assert steps.tokens() == {"short": 6, "long": 2, "after": 2}
    steps.end()


async def test_an_aborted_half_of_a_prompt_makes_room_and_keeps_its_rows(
    runner: ModelRunner,
) -> None:
    steps = Steps(runner, max_size=1)
    steps.add("long", LONG)
    steps.add("next", [5, 6], new=2)
    steps.batch.step()
    steps.batch.step()
    assert steps.batch.abort(lambda rollout: rollout.request_id == "long") == 1
    [last] = steps.chunks["long"]
    assert (last.finish_reason, last.token_ids) == ("abort", [])
    assert last.record is not None
    assert last.record.meta.rows == 2 * PIECE
    steps.batch.step()
    assert steps.tokens() == {"long": 0, "next": 2}
    assert steps.batch.idle


async def test_a_groups_prompt_is_processed_once_and_rows_come_as_places_do(
    runner: ModelRunner,
) -> None:
    steps = Steps(runner, max_size=2)
    steps.add("one", LONG, new=3, group=3)
    steps.add("next", [5, 6], new=1)
    for _ in range(3):
        steps.batch.step()
        assert steps.tokens() == {}
    steps.batch.step()
    assert steps.tokens() == {"one": 2, "one1": 2}
    steps.batch.step()
    assert steps.tokens() == {"one": 3, "one1": 3}
    steps.batch.step()
    assert steps.tokens() == {"one": 3, "one1": 3, "one2": 2, "next": 1}
    steps.batch.step()
    assert steps.batch.idle
    first, *others = [steps.chunks[name][-1].record for name in ("one", "one1", "one2")]
    assert first is not None
    assert first.meta.rows == len(LONG) + 2
    for other in others:
        assert other is not None
        assert other.meta.checksum == first.meta.checksum
