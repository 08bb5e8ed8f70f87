"""How xtuner's rollout worker talks to LMDeploy, re-created from what it sends and reads.

Source: xtuner 1.x, ``xtuner/v1/rl/rollout/{worker,lmdeploy,utils}.py`` and
``xtuner/v1/utils/httpx_utils.py`` of August 2026: which fields, which headers, which checks of
the answer, which statuses are retried.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import requests

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
CLIENT_ERRORS = frozenset({400, 401, 403, 404})
Decode = Callable[[Any], Awaitable[npt.NDArray[Any]]]


async def decode_list(routed_experts: Any) -> npt.NDArray[Any]:
    return np.asarray(routed_experts)


def sample_params(**changes: Any) -> dict[str, Any]:
    """Everything that xtuner sends beside the prompt, the fields LMDeploy ignores included."""
    return {
        "n": 1,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "max_tokens": 2048,
        "stops": [],
        "stop_token_ids": [],
        "skip_special_tokens": True,
        "stream": False,
        "return_logprob": True,
        "top_logprobs": 1,
        "return_token_ids": True,
        "include_stop_str_in_output": True,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
        "return_routed_experts": True,
        **changes,
    }


@dataclass
class Rollout:
    """What xtuner keeps of one sample."""

    prompt: list[int]
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: npt.NDArray[Any] | None = None
    response: str = ""
    finish_reason: str | None = None
    status: str = "init"
    error: str | None = None


class XtunerWorker:
    """One worker in front of one server."""

    def __init__(
        self, url: str, decode: Decode = decode_list, api_key: str | None = None, retries: int = 1
    ) -> None:
        self._url = url
        self._decode = decode
        self._key = api_key
        self._retries = retries

    @property
    def _headers(self) -> dict[str, str]:
        kind = "application/json"
        return {"Content-Type": kind, "Authorization": f"Bearer {self._key}"}

    def is_healthy(self) -> bool:
        return requests.get(f"{self._url}/health", headers=self._headers, timeout=15).ok

    def offload(self) -> None:
        self._post("sleep", {"level": 2})

    def onload_weights(self) -> None:
        self._post("wakeup", {"tags": ["weights"]})

    def onload_kvcache(self) -> None:
        self._post("wakeup", {"tags": ["kv_cache"]})

    def pause(self) -> None:
        """As xtuner does it: without credentials, within 10 s, and 2xx or it raises."""
        url, body = f"{self._url}/abort_request", {"abort_all": True}
        requests.post(url, json=body, timeout=10).raise_for_status()

    def shutdown(self) -> None:
        requests.get(f"{self._url}/terminate", timeout=10).raise_for_status()

    async def generate(
        self, http: httpx.AsyncClient, rollout: Rollout, params: dict[str, Any]
    ) -> Rollout:
        """Send what was sampled so far as the prompt, and join what comes to it."""
        sent = rollout.prompt + rollout.response_ids
        payload = {
            "model": "policy",
            "input_ids": sent,
            **params,
            "max_tokens": params["max_tokens"] - len(rollout.response_ids),
        }
        for attempt in range(self._retries + 1):
            answer = await http.post(f"{self._url}/generate", headers=self._headers, json=payload)
            assert answer.status_code in RETRIED | CLIENT_ERRORS | {200}, answer.status_code
            if answer.status_code == 200:
                return await self._take(rollout, sent, answer.json(), params)
            if answer.status_code in CLIENT_ERRORS or attempt == self._retries:
                rollout.status, rollout.error = "failed", answer.text
                return rollout
        raise AssertionError

    async def _take(
        self, rollout: Rollout, sent: Sequence[int], answer: dict[str, Any], params: dict[str, Any]
    ) -> Rollout:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        pairs = meta["output_token_logprobs"]
        if pairs is not None:
            ids, logprobs = [pair[1] for pair in pairs], [pair[0] for pair in pairs]
        else:
            count = meta["completion_tokens"]
            ids, logprobs = answer["output_ids"][-count:] if count > 0 else [], []
        routes = None
        if params["return_routed_experts"]:
            assert "routed_experts" in meta
            if meta["routed_experts"] is not None:
                routes = await self._decode(meta["routed_experts"])
        if reason in ("stop", "length"):
            wrong = not ids or (params["return_logprob"] and not logprobs)
            if wrong or (params["return_routed_experts"] and routes is None):
                rollout.status, rollout.error = "failed", "incomplete rollout data"
                return rollout
        elif reason != "abort":
            rollout.status, rollout.error = "failed", reason
            return rollout
        assert meta["prompt_tokens"] == len(sent)
        if routes is not None:
            assert routes.ndim == 3
            assert len(routes) == len(sent) + meta["completion_tokens"] - 1
            done = 0 if rollout.routes is None else len(rollout.routes)
            assert rollout.routes is None or done == len(sent) - 1
            earlier = [] if rollout.routes is None else [rollout.routes]
            rollout.routes = np.concatenate([*earlier, routes[done:]])
        rollout.response += answer["text"]
        rollout.response_ids += ids
        rollout.logprobs += logprobs
        rollout.finish_reason = reason
        rollout.status = "aborted" if reason == "abort" else "completed"
        return rollout

    def _post(self, path: str, query: dict[str, Any]) -> None:
        answer = requests.post(
            f"{self._url}/{path}", headers=self._headers, params=query, timeout=60
        )
        assert answer.status_code == 200, answer.status_code
