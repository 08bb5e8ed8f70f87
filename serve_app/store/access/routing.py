"""Which shard has a key's record: the key says, unless the record was restored elsewhere."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.errors import KeyUnreadable, RoutesLost, StoreUnavailable, without_frames
from serve_app.store.access.calls import Actor, ShardCalls
from serve_app.store.base import Meanwhile, Unreadable
from serve_app.store.keys import parse


class KeyRouter:
    """Groups keys by shard and asks each shard once for all of its keys."""

    def __init__(self, app: str, calls: ShardCalls) -> None:
        self._app = app
        self._calls = calls
        self._moved: dict[int, str] = {}

    def by_shard(
        self, keys: Iterable[str]
    ) -> tuple[dict[str, list[str]], dict[str, KeyUnreadable]]:
        """Return the keys of each shard, and those that are none of this application's."""
        groups: dict[str, list[str]] = {}
        foreign: dict[str, KeyUnreadable] = {}
        for text in dict.fromkeys(keys):
            try:
                key = parse(text, self._app)
            except KeyUnreadable as why:
                foreign[text] = without_frames(why)
                continue
            groups.setdefault(self._moved.get(key.epoch, key.shard), []).append(text)
        return groups, foreign

    def ask(
        self,
        keys: Iterable[str],
        call: "Callable[[Actor, list[str]], ray.ObjectRef[Any]]",
        receive: Callable[[list[str], Any], dict[str, Unreadable]],
        meanwhile: Meanwhile | None = None,
    ) -> dict[str, Unreadable]:
        """Ask every key's shard in one call each; return the keys without an answer, and why.

        ``receive`` takes each shard's reply and returns the keys that it could not answer for.
        What is lost may have been restored elsewhere: the directory is asked on such a miss only.
        """
        groups, foreign = self.by_shard(keys)
        unreadable: dict[str, Unreadable] = {**foreign}
        while groups:
            lost: list[str] = []
            for shard, reply in self._calls.ask(groups, call, meanwhile).items():
                texts = groups[shard]
                gone = isinstance(reply, RayError)
                missed = self._calls.explain(texts, reply) if gone else receive(texts, reply)
                unreadable.update(missed)
                lost += [text for text, why in missed.items() if isinstance(why, RoutesLost)]
            meanwhile = None
            try:
                groups, _ = self.by_shard(self.restored(lost))
            except StoreUnavailable as error:  # then nobody knows whether they were restored
                unreadable.update(dict.fromkeys(lost, without_frames(error)))
                return unreadable
            for text in itertools.chain.from_iterable(groups.values()):
                del unreadable[text]
        return unreadable

    def restored(self, lost: list[str]) -> list[str]:
        """Return those of the lost keys that another shard is now found to have."""
        epochs = {text: parse(text, self._app).epoch for text in lost}
        unknown = sorted(set(epochs.values()) - set(self._moved))
        if not unknown:
            return []
        found = self._calls.moved(unknown)
        self._moved.update(found)
        return [text for text, epoch in epochs.items() if epoch in found]
