"""Which keys a shard process answers for: its own epoch's, and those it adopted.

Each start of a process draws an epoch, so that keys of an earlier one read as lost. Restored
records keep their keys: the shard that took them over answers for their epoch, and knows the
secret that signed it.
"""

import secrets

from serve_app.errors import KeyReleased, RoutesLost
from serve_app.store.keys import Key, verify


class Epochs:
    """Turns keys into sequence numbers and back.

    ``adopted`` has the epochs taken over, and the secrets that signed their keys.
    """

    def __init__(self, app: str, shard: str, secret: bytes) -> None:
        self.app = app
        self.shard = shard
        self.own = secrets.randbits(63)
        self._secrets = [secret]
        self.adopted: dict[int, bytes] = {}
        self._adopted: dict[int, dict[int, int]] = {}

    def sign(self, seq: int) -> str:
        """Return the key of one of this process's records."""
        return Key(self.app, self.shard, self.own, seq).sign(self._secrets[0])

    def adopt(self, key: Key, secret: bytes, seq: int) -> None:
        """Answer for a restored record's old key too."""
        if secret not in self._secrets:
            self._secrets.append(secret)
        self.adopted[key.epoch] = secret
        self._adopted.setdefault(key.epoch, {})[key.seq] = seq

    def find(self, text: str) -> int:
        """Return the sequence number behind a key.

        Raises `UnknownKey` for one that no secret here made, `RoutesLost` for one of another
        process, `KeyReleased` for one of an adopted epoch that was not live when saved.
        """
        key = verify(text, self.app, *self._secrets)
        if (key.shard, key.epoch) == (self.shard, self.own):
            return key.seq
        if (adopted := self._adopted.get(key.epoch)) is None:
            raise RoutesLost("the shard process that held the bytes is gone")
        if (seq := adopted.get(key.seq)) is None:
            raise KeyReleased("the key was not live when its shard was saved")
        return seq
