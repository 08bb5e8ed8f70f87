"""Keys whose requests were abandoned: nobody will ever release what nobody has read."""

from collections import OrderedDict

_KEPT = 4096


class Unread:
    """Remembers the keys of one replica's last rollouts, and which requests were abandoned.

    A client may go away before its key exists, while the key is on its way, or after. Whatever
    comes first is kept for the other; both are bounded, and a lease ends what falls out.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._keys: OrderedDict[str, str] = OrderedDict()
        self._abandoned: OrderedDict[str, None] = OrderedDict()

    def begins(self, request_id: str) -> None:
        """Forget what an earlier request of this id left."""
        self._keys.pop(request_id, None)
        self._abandoned.pop(request_id, None)

    def handed_out(self, request_id: str, key: str) -> bool:
        """Note a key; return False if its request was abandoned, so that the key must end."""
        if request_id in self._abandoned:
            return False
        self._keys[request_id] = key
        if len(self._keys) > self._kept:
            self._keys.popitem(last=False)
        return True

    def abandon(self, request_id: str) -> str | None:
        """Return the key that must end, if it exists already."""
        self._abandoned[request_id] = None
        if len(self._abandoned) > self._kept:
            self._abandoned.popitem(last=False)
        return self._keys.pop(request_id, None)
