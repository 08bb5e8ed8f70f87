"""Text with special tokens in it, for requests that want to see them."""

from collections.abc import Sequence

from serve_app.engines.detokenizer import Detokenizer
from serve_app.engines.stop_strings import StopStrings
from serve_app.ingress.edge.prompts import Prompts
from serve_app.types import GenerateChunk, GenerateResult


class AsSampled:
    """Text as the engine gives it: without special tokens."""

    def of_chunk(self, chunk: GenerateChunk) -> str:
        """Return a chunk's new text."""
        return chunk.text

    def of_result(self, result: GenerateResult) -> str:
        """Return a whole rollout's text."""
        return result.text


class WithSpecialTokens(AsSampled):
    """Text decoded here, from the tokens; stop strings cut it as they do in the engine."""

    def __init__(self, prompts: Prompts, stops: Sequence[str]) -> None:
        self._prompts = prompts
        self._stop_strings = tuple(stops)
        self._begin()

    def _begin(self) -> None:
        self._text = Detokenizer(self._prompts.detokenize)
        self._stops = StopStrings(self._stop_strings)

    def of_chunk(self, chunk: GenerateChunk) -> str:
        """Return a chunk's new text."""
        text = "".join(self._stops.feed(self._text.feed(token)) for token in chunk.output_ids)
        if chunk.result is not None:
            text += self._stops.feed(self._text.finish()) + self._stops.finish()
        return text

    def of_result(self, result: GenerateResult) -> str:
        """Return a whole rollout's text."""
        self._begin()
        return self.of_chunk(
            GenerateChunk(result.request_id, result.output_ids, [], result.text, result)
        )
