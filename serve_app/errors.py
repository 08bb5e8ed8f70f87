"""Every error a caller can meet, in one shallow tree.

Each takes one positional message: errors with other constructors lose their type when they
cross a Serve handle (measured on Ray 2.58).
"""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """Return an error that is to be kept, without the frames that it was raised in.

    Kept with them it is part of a cycle, and so is what those frames, and the frames that called
    them, had read: an idle process would pin those bytes until its garbage collector comes by.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class R3Error(Exception):
    """Base of everything r3serve raises on purpose."""


class EngineError(R3Error):
    """The inference engine could not do what was asked."""


class InvalidRequest(EngineError, ValueError):
    """A generation request is wrong in itself; sending it again cannot help."""


class EngineUnavailable(EngineError):
    """No engine replica answered in time. `generate` is never retried by itself."""


class EngineAsleep(EngineUnavailable):
    """The engine sleeps, its weights out of memory; `wake` it first."""


class EngineOverloaded(EngineError):
    """The engine's waiting queue is full; try again later."""


class WeightsMismatch(EngineError, ValueError):
    """New weights do not fit the served model; the old ones stay."""


class RecordError(R3Error, ValueError):
    """A record's bytes, shape, dtype or range are not what they must be."""


class PrefixMismatch(RecordError):
    """The tokens of a continued rollout are not the ones its parent record was captured on."""


class StoreError(R3Error):
    """Base of the expert store's answers."""


class KeyUnreadable(StoreError, KeyError):
    """Base of the reasons why a key has no bytes. Says so for good: a retry cannot help."""

    def __str__(self) -> str:
        """Return the bare message (`KeyError` would show its repr)."""
        return Exception.__str__(self)


class UnknownKey(KeyUnreadable):
    """Not a key of this application: made up, mangled, or from another application."""


class KeyReleased(KeyUnreadable):
    """The key was released."""


class KeyExpired(KeyUnreadable):
    """The key's lease ended before anybody read, renewed or released it."""


class RoutesLost(KeyUnreadable):
    """The shard that held the bytes is gone. Sample again, or mask."""


class ModelUnknown(RoutesLost):
    """None of a batch's sequences has routes left, so not even their shape is known."""


class RoutesGap(StoreError, ValueError):
    """Rows inside a sequence were never captured."""


class StoreFull(StoreError):
    """The shard's byte budget stayed exhausted for the whole put timeout."""


class StoreUnavailable(StoreError):
    """The shard did not answer in time. May be retried."""


class SnapshotError(StoreError, ValueError):
    """A snapshot, or one of its files, cannot be written or read."""


class DecoderUnavailable(StoreUnavailable):
    """No decoder replica answered in time. May be retried; reading locally needs none."""


class ReplayError(R3Error):
    """The recorded routes cannot be replayed in this forward pass."""
