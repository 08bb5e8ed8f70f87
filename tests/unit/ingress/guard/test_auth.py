"""Who a request comes from, and what its key opens."""

import pytest

from serve_app.config import IngressArgs
from serve_app.ingress.guard.auth import Caller, KeyRing, Refusal


def test_the_name_of_a_caller_is_not_its_key() -> None:
    ring = KeyRing(IngressArgs.model_validate({"api_keys": ["a", "b"], "admin_keys": ["c"]}))
    assert ring.admit("/generate", "Bearer b", None) == Caller("api-1", admin=False)
    assert ring.admit("/sleep", "Bearer c", None) == Caller("admin-0", admin=True)
    refused = ring.admit("/generate", "Bearer é", None)
    assert isinstance(refused, Refusal)
    assert "é" not in refused.message


def test_admin_keys_alone_leave_sampling_free() -> None:
    ring = KeyRing(IngressArgs.model_validate({"admin_keys": ["c"]}))
    assert isinstance(ring.admit("/generate", None, None), Caller)
    assert ring.admit("/sleep", None, None) != Caller("anonymous", admin=True)
    free = KeyRing(IngressArgs()).admit("/sleep", None, None)
    assert free == Caller("anonymous", admin=True)


@pytest.mark.parametrize("client", [None, "", "not an address", "10.0.0.1", "::1"])
def test_an_address_outside_every_network_opens_nothing(client: str | None) -> None:
    given = {"admin_keys": ["c"], "open_networks": ["192.168.0.0/16", "fd00::/8"]}
    ring = KeyRing(IngressArgs.model_validate(given))
    assert isinstance(ring.admit("/terminate", None, client), Refusal)
    assert isinstance(ring.admit("/terminate", None, "192.168.3.4"), Caller)
    assert isinstance(ring.admit("/sleep", None, "192.168.3.4"), Refusal)


def test_empty_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        KeyRing(IngressArgs.model_validate({"api_keys": [""]}))


def test_keys_do_not_show_where_a_configuration_is_printed() -> None:
    assert "secret" not in repr(IngressArgs.model_validate({"api_keys": ["secret"]}))
