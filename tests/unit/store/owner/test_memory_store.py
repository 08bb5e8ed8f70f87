"""The in-memory store keeps the store's contract."""

import pytest

from serve_app.config import StoreArgs
from serve_app.store.owner.memory import MemoryStore
from tests.store_contract import MakeStore, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        def make(app: str = "unit", **args: object) -> MemoryStore:
            return MemoryStore(app, StoreArgs.model_validate({"backend": "memory", **args}))

        return make
