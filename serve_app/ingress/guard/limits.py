"""How much one replica takes on: requests at once, requests of one key, bytes of bodies."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from serve_app.config import IngressArgs

SAMPLING = frozenset({"/generate", "/v1/chat/completions", "/v1/completions"})


@dataclass(frozen=True, slots=True)
class Busy:
    """Why a request must come again later: 429 for its key, 503 for the whole replica."""

    status: Literal[429, 503]
    message: str


class Load:
    """Counts what runs. `enter` and `leave` come in pairs."""

    def __init__(self, args: IngressArgs) -> None:
        self._args = args
        self.sampling = 0
        self._of_key: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}

    def enter(self, path: str, caller: str) -> Busy | None:
        """Take a request in, or say why not."""
        if path not in SAMPLING:
            return None
        most, rate = self._args.max_per_key, self._args.requests_per_s_per_key
        if most is not None and self._of_key[caller] >= most:
            return Busy(429, f"at most {most} requests of one key at once")
        if self.sampling >= self._args.sampling_limit:
            return Busy(503, f"this replica samples {self.sampling} requests already")
        if rate is not None and not self._buckets.setdefault(caller, _Bucket(rate)).take():
            return Busy(429, f"at most {rate:g} requests of one key a second")
        self.sampling += 1
        self._of_key[caller] += 1
        return None

    def leave(self, path: str, caller: str) -> None:
        """Let a request go that was taken in."""
        if path in SAMPLING:
            self.sampling -= 1
            self._of_key[caller] -= 1


class _Bucket:
    """Lets ``rate`` a second through, and as many at once after a quiet second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = self._most = max(1.0, rate)
        self._at = time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
