"""Text while it is sampled: whole characters, and nothing of a stop string."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engines.detokenizer import LONGEST_WAIT, Detokenizer
from serve_app.engines.stop_strings import StopStrings

BROKEN = "\N{REPLACEMENT CHARACTER}"
SPECIAL = 256


def byte_decode(tokens: list[int]) -> str:
    """One token a byte; tokens from 256 on are special and have no text."""
    return bytes(token for token in tokens if token < SPECIAL).decode("utf-8", errors="replace")


def word_decode(tokens: list[int]) -> str:
    """Like a SentencePiece tokenizer: every word brings its space, but the first loses it."""
    return " ".join(f"w{token}" for token in tokens)


def stream(decode: Callable[[list[int]], str], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.finish()]


def test_characters_come_whole() -> None:
    assert stream(byte_decode, list("aé€😀".encode())) == [
        *("a", "", "é", "", "", "€", "", "", "", "😀"),
        "",
    ]


def test_a_character_that_is_never_completed_comes_at_the_end() -> None:
    assert stream(byte_decode, list("a😀".encode()[:-1])) == ["a", "", "", "", BROKEN]


def test_spaces_between_words_stay() -> None:
    assert stream(word_decode, [1, 2, 3]) == ["w1", " w2", " w3", ""]


@given(st.text(), st.lists(st.integers(0, 40), max_size=5))
def test_any_text_comes_back(text: str, special_at: list[int]) -> None:
    tokens = list(text.encode())
    for place in special_at:
        tokens.insert(place, SPECIAL)
    assert "".join(stream(byte_decode, tokens)) == byte_decode(tokens)


@given(st.binary(max_size=LONGEST_WAIT))
def test_any_bytes_decode_as_if_at_once(data: bytes) -> None:
    assert "".join(stream(byte_decode, list(data))) == byte_decode(list(data))


@pytest.mark.parametrize("filler", [0x80, SPECIAL])
def test_a_long_run_without_characters_does_not_pile_up(filler: int) -> None:
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return byte_decode(tokens)

    tokens = [*b"a", *([filler] * 1000), *"😀".encode()]
    text = "".join(stream(decode, tokens))
    assert text == byte_decode(tokens)
    assert longest < 3 * LONGEST_WAIT


def stops(strings: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    found = StopStrings(strings)
    shown = [found.feed(piece) for piece in pieces]
    return [*shown, found.finish()], found.found


@pytest.mark.parametrize(
    ("strings", "pieces", "shown", "found"),
    [
        ((), ["ab", "c"], ["ab", "c", ""], False),
        (("bc",), ["ab", "cd"], ["a", "", ""], True),
        (("bc",), ["ab", "d"], ["a", "bd", ""], False),
        (("bc",), ["ab"], ["a", "b"], False),
        (("xyz", "b"), ["abxyz"], ["a", ""], True),
        (("aab",), ["aaa", "ab"], ["a", "a", ""], True),
        (("stop",), ["s", "t", "o", "p", "!"], ["", "", "", "", "", ""], True),
        (("a", "abc"), ["ab", "c"], ["", "", ""], True),
    ],
)
def test_stop_strings(
    strings: tuple[str, ...], pieces: list[str], shown: list[str], found: bool
) -> None:
    assert stops(strings, pieces) == (shown, found)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
def test_what_is_shown_is_the_text_before_the_first_stop_string(
    strings: list[str], pieces: list[str]
) -> None:
    text = ""
    matcher = StopStrings(strings)
    shown = ""
    for piece in pieces:
        text += piece
        shown += matcher.feed(piece)
        places = [text.index(string) for string in strings if string in text]
        assert matcher.found == bool(places)
        if places:
            assert shown == text[: min(places)]
            return
        assert text.startswith(shown)
        # Held back is only what a stop string may still come of.
        held = text[len(shown) :]
        assert not held or any(string.startswith(held) for string in strings)
    assert shown + matcher.finish() == text
