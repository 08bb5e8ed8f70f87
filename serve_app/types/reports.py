"""What replicas and shards tell of themselves."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WeightsResult:
    """How one engine replica took new weights."""

    replica: str
    version: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ShardStats:
    """Counters of one shard since it started, and what it holds now (bytes are exact).

    ``lost`` counts keys of earlier processes that were asked for; ``shared_rows`` the rows that
    children did not store because an ancestor had them; ``unrouted_rows`` rows that came with a
    repeated expert and so were never routed; ``oldest_s`` is an age in seconds.
    """

    shard: str
    live_keys: int
    live_bytes: int
    byte_budget: int
    waiting_puts: int
    puts: int
    gets: int
    released: int
    expired: int
    full: int
    lost: int = 0
    shared_rows: int = 0
    oldest_s: float = 0.0
    unrouted_rows: int = 0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The application's shards, and the ones that did not answer."""

    shards: tuple[ShardStats, ...]
    unreachable: tuple[str, ...] = field(default=())

    @property
    def live_keys(self) -> int:
        """Keys that read now, over all shards."""
        return sum(shard.live_keys for shard in self.shards)

    @property
    def live_bytes(self) -> int:
        """Bytes held for live keys, over all shards."""
        return sum(shard.live_bytes for shard in self.shards)
