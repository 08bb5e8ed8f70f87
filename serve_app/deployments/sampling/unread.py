"""Keys whose requests were abandoned: nobody will ever release what nobody has read."""

import re
from collections import OrderedDict
from dataclasses import dataclass, field

_KEPT = 4096
_MEMBER = re.compile(r"(.+)-\d+")


@dataclass(slots=True)
class _Request:
    """The last attempt at a request, by its own id or those of its group's members.

    ``retried``: an attempt before it may still get its keys, under the same ids.
    """

    retried: bool
    may_get_keys: bool = True
    keys: dict[str, str] = field(default_factory=dict)
    abandoned: set[str] = field(default_factory=set)


class Unread:
    """Remembers the keys of one replica's last requests, and which of them were abandoned.

    A client may go away before its key exists, while the key is on its way, or after. Whatever
    comes first is kept for the other; both are bounded, and a lease ends what falls out.

    An id names a request, not the attempt at it. Where an earlier attempt may still get its key,
    nothing is remembered of a later one and nothing of either is ended here: who abandoned one
    attempt must not take away the key that another was given. Their leases end them.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    def begins(self, request_id: str) -> None:
        """Forget what an earlier attempt at this request, or at its group, was given."""
        earlier = self._requests.pop(request_id, None)
        retried = earlier is not None and (earlier.retried or earlier.may_get_keys)
        self._remembered(request_id, retried)

    def handed_out(self, request_id: str, key: str) -> bool:
        """Note a key; return False if its request was abandoned, so that the key must end."""
        request = self._of(request_id) or self._remembered(request_id, retried=False)
        if request.retried:
            return True
        if request_id in request.abandoned:
            return False
        request.keys[request_id] = key
        # A group has as many keys as members, and nobody here knows how many those are.
        request.may_get_keys = request_id not in self._requests
        return True

    def abandon(self, request_id: str) -> str | None:
        """Return the key that must end, if it exists already and can be of no other attempt."""
        request = self._of(request_id)
        if request is None or request.retried:
            return None
        request.abandoned.add(request_id)
        return request.keys.pop(request_id, None)

    def _remembered(self, request_id: str, retried: bool) -> _Request:
        request = self._requests[request_id] = _Request(retried)
        if len(self._requests) > self._kept:
            self._requests.popitem(last=False)
        return request

    def _of(self, request_id: str) -> _Request | None:
        if found := self._requests.get(request_id):
            return found
        member = _MEMBER.fullmatch(request_id)
        return self._requests.get(member[1]) if member else None
