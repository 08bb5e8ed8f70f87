"""The in-memory store keeps the store's contract."""

import pytest

from serve_app.config import StoreArgs
from serve_app.store.owner.memory import MemoryStore
from tests.store_contract import MakeStore, StoreContract
from tests.track_contract import TrackContract


@pytest.fixture
def make_store() -> MakeStore:
    def make(app: str = "unit", **args: object) -> MemoryStore:
        return MemoryStore(app, StoreArgs.model_validate({"backend": "memory", **args}))

    return make


class TestMemoryStore(StoreContract):
    """Everything a `RecordStore` promises, in one process."""


class TestMemoryTracks(TrackContract):
    """The same of tracks, cut parents and versions."""
