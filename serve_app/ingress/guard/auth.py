"""Who may do what: bearer keys, compared in constant time."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from serve_app.config import IngressArgs

Right = Literal["none", "sample", "admin"]

# As LMDeploy asks for keys; weights, sleep and abort need one of their own.
RIGHTS: Mapping[str, Right] = {
    "/health": "none",
    "/abort_request": "admin",
    "/terminate": "admin",
    "/sleep": "admin",
    "/wakeup": "admin",
    "/update_weights": "admin",
    "/init_weights_update_group": "admin",
    "/update_weights_from_distributed": "admin",
    "/destroy_weights_update_group": "admin",
}
KEYLESS = frozenset({"/abort_request", "/terminate"})
"""What xtuner calls without credentials."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not pass: 401 without a key that counts, 403 with one that may not."""

    status: Literal[401, 403]
    message: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, without the key: ``api-0`` is the first of the API keys."""

    name: str
    admin: bool


class KeyRing:
    """Knows keys by their hashes only."""

    def __init__(self, args: IngressArgs) -> None:
        admins = _read(args.admin_keys, args.admin_keys_file)
        users = _read(args.api_keys, args.api_keys_file)
        self._callers = [
            *((_digest(key), Caller(f"admin-{number}", True)) for number, key in enumerate(admins)),
            *((_digest(key), Caller(f"api-{number}", False)) for number, key in enumerate(users)),
        ]
        self._sampling_is_free = not users
        self._all_is_free = not users and not admins
        self._no_admins = not admins
        self._open_networks = args.open_networks

    def admit(self, path: str, authorization: str | None, client: str | None) -> Caller | Refusal:
        """Return the caller, or why the request is refused."""
        caller = self._caller(authorization)
        right = RIGHTS.get(path, "sample")
        anybody = caller or Caller("anonymous", admin=self._all_is_free)
        if right == "none" or anybody.admin:
            return anybody
        if right == "sample":
            if caller or self._sampling_is_free:
                return anybody
            return Refusal(401, "expected one of this server's keys: Authorization: Bearer KEY")
        if path in KEYLESS and self._is_open_to(client):
            return anybody
        if self._no_admins:
            return Refusal(403, f"{path} needs an admin key, and this server has none configured")
        if caller:
            return Refusal(403, f"{path} needs an admin key, got a key for sampling")
        return Refusal(401, f"{path} needs an admin key: Authorization: Bearer KEY")

    def _caller(self, authorization: str | None) -> Caller | None:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest, found = _digest(key.strip()), None
        for known, caller in self._callers:  # all of them, whichever matches
            if hmac.compare_digest(digest, known) and found is None:
                found = caller
        return found

    def _is_open_to(self, client: str | None) -> bool:
        try:
            address = ip_address(client or "")
        except ValueError:
            return False
        return any(address in network for network in self._open_networks)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(keys: Iterable[SecretStr], file: Path | None) -> list[str]:
    found = [key.get_secret_value() for key in keys]
    if file is not None:
        found += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if not found:
            raise ValueError(f"expected a key a line in {file}, found none")
    if not all(found):
        raise ValueError("expected keys that are not empty, got ''")
    return found
