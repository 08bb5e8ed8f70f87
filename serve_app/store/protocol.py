"""What an application's detached actors and their callers understand of each other: a number.

The actors outlive the code that began them, and what they hold and answer was pickled under that
code's names. So whoever connects asks for the number first, which any version can read. Actors
begun before there was one have no method to ask.
"""

from typing import Any

import ray
from ray.actor import ActorHandle

from serve_app.errors import StoreError

PROTOCOL = 4
"""What they say to each other; any change of it is another number."""


def ask_protocol(actor: ActorHandle[Any], what: str, app: str) -> "ray.ObjectRef[int]":
    """Ask an actor for its number; raise `StoreError` if it was begun before there was one."""
    try:
        asked: ray.ObjectRef[int] = actor.r3serve_protocol.remote()
    except AttributeError:
        raise _refusal("an earlier protocol", what, app) from None
    return asked


def check_protocol(theirs: int, what: str, app: str) -> None:
    """Raise `StoreError` where ``what`` of an application runs another version of r3serve."""
    if theirs != PROTOCOL:
        raise _refusal(f"protocol {theirs}", what, app)


def _refusal(theirs: str, what: str, app: str) -> StoreError:
    return StoreError(
        f"the {what} of {app!r} speaks {theirs}, this process {PROTOCOL}: run the same version of"
        f" r3serve everywhere, and end what an earlier one began with 'r3serve store destroy {app}'"
    )
