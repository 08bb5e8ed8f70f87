"""Clients of LMDeploy and OpenAI as they are: openai, and what xtuner sends and reads."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.graph.conftest import MODEL
from tests.http_server import LocalGraph, listening
from tests.xtuner_client import Rollout, XtunerWorker, sample_params

CHAT: Any = [{"role": "user", "content": "hello"}]


def test_openai_names_and_uses_the_model(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=CHAT, max_tokens=5, seed=1, logprobs=True, n=2
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + (
            answer.usage.completion_tokens
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert all(token.logprob < 0 for token in logprobs.content)
        text = client.completions.create(model=model, prompt="hello", max_tokens=5, seed=1)
        assert isinstance(text.choices[0].text, str)


def test_openai_streams(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: Any = {"model": MODEL, "messages": CHAT, "max_tokens": 20, "seed": 4}
        whole = client.chat.completions.create(**options)
        chunks = list(
            client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        pieces = client.completions.create(
            model=MODEL, prompt="hello", max_tokens=20, seed=4, stream=True
        )
        assert list(pieces)[-1].choices[0].finish_reason in ("stop", "length")


async def test_openai_async(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4)
                for _ in range(4)
            )
        )
        assert all(answer.choices[0].message.role == "assistant" for answer in answers)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=4, stream=True
        )
        roles = [chunk.choices[0].delta.role async for chunk in stream]
        assert roles[0] == "assistant"


def test_openai_raises_its_own_errors(graph: LocalGraph) -> None:
    edge = graph.edge(model_name=MODEL, api_keys=["right"], access_log=False)
    with listening(edge) as url:
        stranger = OpenAI(base_url=f"{url}/v1", api_key="wrong")
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with OpenAI(base_url=f"{url}/v1", api_key="right") as client:
            assert client.models.list().data[0].id == MODEL
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.completions.create(model="gpt", prompt="x")
            with pytest.raises(openai.BadRequestError, match="512"):
                client.completions.create(model=MODEL, prompt=[512])


async def test_xtuner_samples_pauses_and_goes_on(lists: LocalGraph) -> None:
    """Lists of routes, partial rollouts joined, sleep and wake between steps."""
    with listening(lists.edge(access_log=False)) as url:
        worker = XtunerWorker(url)
        assert await asyncio.to_thread(worker.is_healthy)
        async with httpx.AsyncClient(timeout=60) as http:
            rollout = Rollout([5, 6, 7])
            params = sample_params(max_tokens=400, ignore_eos=True)
            sampling = asyncio.create_task(worker.generate(http, rollout, params))
            while not sampling.done():
                await asyncio.to_thread(worker.pause)
                await asyncio.sleep(0.05)
            assert rollout.status == "aborted", rollout.error
            if rollout.response_ids:
                assert rollout.routes is not None
            await worker.generate(http, rollout, params)
            assert (rollout.status, len(rollout.response_ids)) == ("completed", 400)
            assert len(rollout.logprobs) == 400
            assert rollout.routes is not None
            assert rollout.routes.shape == (402, 4, 4)
            await asyncio.to_thread(worker.offload)
            asleep = await worker.generate(http, Rollout([5]), params)
            assert asleep.status == "failed"
            await asyncio.to_thread(worker.onload_weights)
            await asyncio.to_thread(worker.onload_kvcache)
            await asyncio.to_thread(worker.shutdown)
            awake = await worker.generate(http, Rollout([5]), sample_params(max_tokens=3))
            assert awake.status == "completed"


async def test_xtuner_without_routes_and_in_chat(graph: LocalGraph, url: str) -> None:
    params = sample_params(return_routed_experts=False, return_logprob=False, max_tokens=4)
    async with httpx.AsyncClient(timeout=60) as http:
        rollout = await XtunerWorker(url).generate(http, Rollout([5, 6]), params)
        assert rollout.status == "completed"
        wrong = await XtunerWorker(url).generate(http, Rollout([5] * 600), params)
        assert wrong.status == "failed"
        payload = {
            "model": MODEL,
            "messages": CHAT,
            "temperature": 1.0,
            "top_p": 1.0,
            "n": 1,
            "stream": False,
            "max_tokens": 4,
            "repetition_penalty": 1.0,
            "top_k": 0,
            "skip_special_tokens": True,
        }
        answer = (await http.post(f"{url}/v1/chat/completions", json=payload)).json()
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
        assert "content" in answer["choices"][0]["message"]
