"""Which parts of a replica sleep, by the names that LMDeploy's clients wake them with."""

from collections.abc import Iterable
from typing import Literal

from serve_app.errors import EngineAsleep, InvalidRequest

SleepTag = Literal["weights", "kv_cache"]
TAGS: frozenset[str] = frozenset({"weights", "kv_cache"})


class SleepingParts:
    """Everything falls asleep at once; weights and caches are woken one by one or together."""

    def __init__(self) -> None:
        self.asleep: frozenset[str] = frozenset()

    def fall_asleep(self) -> None:
        """Note that all sleeps."""
        self.asleep = TAGS

    def after_waking(self, tags: Iterable[str]) -> frozenset[str]:
        """Return what still sleeps once ``tags`` were woken; no tags means all."""
        waking = frozenset(tags) or TAGS
        if unknown := waking - TAGS:
            raise InvalidRequest(f"expected tags of {sorted(TAGS)}, got {sorted(unknown)}")
        return self.asleep - waking

    def check_awake(self) -> None:
        """Raise `EngineAsleep` unless everything is awake."""
        if self.asleep:
            raise EngineAsleep(f"the engine sleeps: wake {sorted(self.asleep)} first")
