"""Errors that are kept: what was read when they were raised must not be kept with them."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from serve_app.errors import KeyReleased, RoutesLost, UnknownKey, without_frames
from serve_app.store.access.routing import KeyRouter


class Bytes:
    """Stands for an array that somebody had read when an error came."""


def kept_error(strip: bool) -> "weakref.ref[Bytes]":
    answers: list[Exception] = []
    read = Bytes()
    try:
        try:
            raise ValueError("what it came from")
        except ValueError as cause:
            raise UnknownKey("no such key") from cause
    except UnknownKey as error:
        answers.append(without_frames(error) if strip else error)
    return weakref.ref(read)


@pytest.mark.parametrize("strip", [True, False])
def test_only_an_error_without_its_frames_lets_go_of_what_was_read(strip: bool) -> None:
    gc.disable()
    try:
        assert (kept_error(strip)() is None) == strip
    finally:
        gc.enable()


def test_keys_of_others_pin_nothing_that_was_read_with_them() -> None:
    router = KeyRouter("mine", calls=None)  # type: ignore[arg-type]  # no shard is asked

    def read() -> "tuple[weakref.ref[Any], dict[str, Any]]":
        array = np.zeros(8)
        return weakref.ref(array), router.by_shard(["no key"])[1]

    gc.disable()
    try:
        array, foreign = read()
        assert array() is None
        assert isinstance(foreign["no key"], UnknownKey)
    finally:
        gc.enable()


def test_an_error_without_frames_is_the_same_error() -> None:
    for kind in (UnknownKey, KeyReleased, RoutesLost):
        error = kind("why")
        assert without_frames(error) is error
        assert str(error) == "why"
