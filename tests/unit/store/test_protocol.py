"""A change of what detached actors and their callers say to each other gets a new number."""

import inspect
from collections.abc import Callable
from typing import Any

from serve_app.config import StoreArgs
from serve_app.records import RecordMeta, TrackMeta
from serve_app.store.access.compat import CompatStore
from serve_app.store.offers import Offer
from serve_app.store.owner.answers import ReadAnswer
from serve_app.store.owner.directory import Directory, Settings
from serve_app.store.owner.shard import Shard, ShardIdentity
from serve_app.store.protocol import PROTOCOL
from serve_app.store.snapshot import Entry, Page
from serve_app.types import ShardStats
from serve_app.weights.holder import Newest, PackedTensor, WeightsHolder

ACTORS = Directory, Shard, WeightsHolder, CompatStore
MESSAGES = (
    Settings,
    ShardIdentity,
    StoreArgs,
    RecordMeta,
    TrackMeta,
    ReadAnswer,
    Offer,
    Entry,
    Page,
    ShardStats,
    Newest,
    PackedTensor,
)
SAID = {
    "Settings": "secret args",
    "ShardIdentity": "app shard epoch door",
    "StoreArgs": "backend byte_budget lease_s put_timeout_s call_timeout_s"
    " leave_after_s compat_actors compat_grace_s serve",
    "RecordMeta": "rows layers top_k num_experts start moe_layers weight_version"
    " checksum invalid unrouted_rows format_version raw tracks",
    "TrackMeta": "name dtype shape values checksum",
    "ReadAnswer": "packed small refs",
    "Offer": "meta tag lease_s parent data parent_rows",
    "Entry": "key parent tag lease_s live meta parent_rows",
    "Page": "entries next tracks",
    "ShardStats": "shard live_keys live_bytes byte_budget waiting_puts puts gets"
    " released expired full lost shared_rows oldest_s unrouted_rows",
    "Directory.adopt": "self secret epochs shard",
    "Directory.configure": "self args",
    "Directory.explain": "self keys",
    "Directory.moved": "self epochs",
    "Directory.r3serve_protocol": "self",
    "Directory.settings": "self",
    "Shard.adopt": "self secret new_keys",
    "Shard.adopted": "self",
    "Shard.configure": "self args",
    "Shard.describe": "self keys",
    "Shard.identity": "self",
    "Shard.page": "self tag first",
    "Shard.pull": "self producer number packed",
    "Shard.read": "self keys columns",
    "Shard.release": "self keys tag below",
    "Shard.renew": "self keys tag lease_s",
    "Shard.reserve": "self nbytes",
    "Shard.retag": "self keys tag",
    "Shard.stats": "self",
    "Shard.take": "self grant offer columns",
    "Shard.take_small": "self packed",
    "Newest": "weights version",
    "PackedTensor": "bits dtype",
    "WeightsHolder.commit": "self version",
    "WeightsHolder.discard": "self version",
    "WeightsHolder.newest": "self",
    "WeightsHolder.r3serve_protocol": "self",
    "WeightsHolder.stage": "self weights version",
    "CompatStore.clear": "self",
    "CompatStore.configure": "self args",
    "CompatStore.get": "self key",
    "CompatStore.put": "self array",
}


def test_what_is_said_has_not_changed_under_the_same_number() -> None:
    said: dict[str, Callable[..., Any]] = {message.__name__: message for message in MESSAGES}
    for actor in ACTORS:
        methods = inspect.getmembers(actor, inspect.isfunction)
        said |= {f"{actor.__name__}.{name}": call for name, call in methods if name[0] != "_"}
    now = {name: " ".join(inspect.signature(call).parameters) for name, call in said.items()}
    assert (PROTOCOL, now) == (4, SAID)
