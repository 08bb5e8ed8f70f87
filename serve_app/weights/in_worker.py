"""A worker's part in an update that comes in parts: functions that are run in the worker itself.

A trainer numbers its process group by GPUs, and NCCL takes a GPU once: so each worker joins, and
what the trainer pickles for a GPU is unpickled on that GPU. One worker's tensors are kept for the
update, since all get the same.
"""

from typing import Any

from serve_app.weights.holder import Packed, pack
from serve_app.weights.parts import BroadcastPart, GroupSpec, PickledPart, WeightsInbox

_INBOX = "r3serve_weights_inbox"


def join(worker: Any, spec: GroupSpec, index: int, timeout_s: float) -> None:
    """Become rank ``rank_offset`` + ``index`` of a trainer's group."""
    _inbox(worker).join(spec, index, timeout_s)


def leave(worker: Any, name: str) -> None:
    """Leave a trainer's group."""
    _inbox(worker).leave(name)


def unpickle(worker: Any, part: PickledPart, keep: bool) -> int:
    """Take tensors that were pickled for this worker; return how many."""
    return _kept(_inbox(worker), _inbox(worker).unpickle(part), keep)


def receive(worker: Any, part: BroadcastPart, keep: bool) -> int:
    """Take tensors that rank 0 broadcasts; return how many."""
    return _kept(_inbox(worker), _inbox(worker).receive(part), keep)


def take(worker: Any) -> Packed:
    """Return all that was kept here, and begin anew."""
    return pack(_inbox(worker).take())


def _inbox(worker: Any) -> WeightsInbox:
    found: WeightsInbox = worker.__dict__.setdefault(_INBOX, WeightsInbox())
    return found


def _kept(inbox: WeightsInbox, count: int, keep: bool) -> int:
    if not keep:
        inbox.clear()
    return count
