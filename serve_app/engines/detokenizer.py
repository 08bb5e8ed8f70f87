"""From token ids to text, piece by piece, never splitting a character."""

from collections.abc import Callable

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A run of broken bytes ends in the replacement character for ever: give up waiting after this
# many tokens, but keep the last three, since a character has four bytes at most.
LONGEST_WAIT = 64
BYTES_TO_KEEP = 3

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Incremental ``decode``.

    Tokens are decoded together with the ones before them, since a tokenizer may drop the space
    that begins a text: ``_context`` tokens were emitted already, ``_pending`` were not.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Return the text that became certain with this token."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if len(text) <= len(self._context_text):
            if len(self._pending) > LONGEST_WAIT:
                self._pending.clear()  # tokens without text, such as special ones
            return ""
        if not text.endswith(INCOMPLETE):
            return self._emit(text, len(self._pending))
        if len(self._pending) > LONGEST_WAIT:
            certain = len(self._pending) - BYTES_TO_KEEP
            return self._emit(self._decode(self._context + self._pending[:certain]), certain)
        return ""

    def finish(self) -> str:
        """Return the rest, whether complete or not."""
        if not self._pending:
            return ""
        return self._emit(self._decode(self._context + self._pending), len(self._pending))

    def _emit(self, text: str, tokens: int) -> str:
        new = text[len(self._context_text) :]
        self._context, self._pending = self._pending[:tokens], self._pending[tokens:]
        self._context_text = self._decode(self._context)
        return new
