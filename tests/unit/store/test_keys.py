"""Keys say where their record lives, and that nobody made them up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import UnknownKey
from serve_app.store.keys import Key, parse, verify


@given(
    app=st.text(min_size=1, max_size=40),
    shard=st.binary(min_size=5, max_size=5),
    epoch=st.integers(0, 2**63 - 1),
    seq=st.integers(0, 2**63),
)
def test_a_key_says_where_it_lives(app: str, shard: bytes, epoch: int, seq: int) -> None:
    key = Key(app, shard.hex(), epoch, seq)
    text = key.sign(b"secret")
    assert parse(text, app) == verify(text, app, b"secret") == key
    assert text.isascii()
    assert not set(text) & set("+/=&? ")


@given(app=st.sampled_from(["a", "ab", "abc"]), at=st.integers(0, 10_000), bit=st.integers(0, 5))
def test_any_altered_character_makes_a_key_unknown(app: str, at: int, bit: int) -> None:
    text = Key(app, "0123456789", 7, 9).sign(b"secret")
    at %= len(text)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = alphabet[alphabet.index(text[at]) ^ (1 << bit)]
    with pytest.raises(UnknownKey):
        verify(text[:at] + other + text[at + 1 :], app, b"secret")


def test_another_secret_makes_a_key_unknown() -> None:
    text = Key("rollout", "0123456789", 7, 9).sign(b"secret")
    with pytest.raises(UnknownKey, match="ever handed out"):
        verify(text, "rollout", b"other")
