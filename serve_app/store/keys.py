"""Keys: opaque, URL-safe, and self-describing enough to find their shard without a look-up.

base64url(version u8 | len(app) u8 | app | shard 5 bytes | epoch u64 | sequence u64 | MAC 12 bytes)

The MAC (blake2b under the application's secret) makes holding a key the right to read. Readers
parse a key to route it; only the shard, which has the secret, verifies it.
"""

import base64
import binascii
import hashlib
import hmac
import struct
from dataclasses import dataclass
from functools import lru_cache

from serve_app.errors import UnknownKey

_VERSION = 1
_MAC_BYTES = 12
_TAIL = struct.Struct(">5sQQ")
_REMEMBERED = 1 << 12
"""Keys of a large batch, at 0.8 kB each."""


@dataclass(frozen=True, slots=True)
class Key:
    """Where a record lives: ``shard`` is the first 10 hex digits of its node's id."""

    app: str
    shard: str
    epoch: int
    seq: int

    def _body(self) -> bytes:
        app = self.app.encode()
        tail = _TAIL.pack(bytes.fromhex(self.shard), self.epoch, self.seq)
        return bytes((_VERSION, len(app))) + app + tail

    def sign(self, secret: bytes) -> str:
        """Return the key's text."""
        body = self._body()
        return _text(body + _mac(secret, body))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _mac(secret: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(body, key=secret, digest_size=_MAC_BYTES).digest()


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise UnknownKey(f"a key is a str, got {type(text).__name__}")
    return text


# One read looks at a key where it is routed, where it is checked, and where it is sorted.
@lru_cache(maxsize=_REMEMBERED)
def _split(text: str) -> tuple[Key, bytes, bytes]:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        if raw[0] != _VERSION or len(raw) != 2 + raw[1] + _TAIL.size + _MAC_BYTES:
            raise ValueError("wrong version or length")
        if _text(raw) != text:
            raise ValueError("base64 with stray bits: another text for the same bytes")
        app = raw[2 : 2 + raw[1]].decode()
        shard, epoch, seq = _TAIL.unpack_from(raw, 2 + raw[1])
    except (ValueError, IndexError, binascii.Error) as error:
        raise UnknownKey(f"not a routed-experts key: {shorten(text)}") from error
    return Key(app, shard.hex(), epoch, seq), raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]


def parse(text: str, app: str) -> Key:
    """Read a key of application ``app``; raise `UnknownKey` for any other text.

    Says nothing about the MAC: only the holder of the secret can.
    """
    key, _, _ = _split(_checked(text))
    _check_app(key, app)
    return key


def _check_app(key: Key, app: str) -> None:
    if key.app != app:
        raise UnknownKey(f"key belongs to application {key.app!r}, not to {app!r}")


def verify(text: str, app: str, *secrets: bytes) -> Key:
    """Read a key and check its MAC; raise `UnknownKey` if none of the secrets made it."""
    return _verified(_checked(text), app, secrets)


# Every rank of a trainer reads the same keys, and the next pass reads them again.
@lru_cache(maxsize=_REMEMBERED)
def _verified(text: str, app: str, secrets: tuple[bytes, ...]) -> Key:
    key, body, mac = _split(text)
    _check_app(key, app)
    for secret in secrets:
        if hmac.compare_digest(mac, _mac(secret, body)):
            return key
    raise UnknownKey(f"no such key was ever handed out: {shorten(text)}")


def shorten(text: str) -> str:
    """Return enough of a key to find it in a log, too little to read with it."""
    return text if len(text) <= 12 else f"{text[:4]}…{text[-4:]}"
