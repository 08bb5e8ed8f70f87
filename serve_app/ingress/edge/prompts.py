"""Text to tokens and back: the served model's own tokenizer and chat template."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from jinja2 import TemplateError

from serve_app.errors import InvalidRequest

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]

# A template is the server's; what else apply_chat_template takes is not the client's to say.
_NOT_FOR_CLIENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# What a template raises when messages are not what it expects.
_TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Prompts:
    """Works in threads, since long texts take long. The first to ask waits for the tokenizer.

    Everything raises `InvalidRequest` for a model without tokenizer, and for text that no
    tokenizer can read.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._tokenizer: Any = None
        self._loading = Lock()
        self._threads = ThreadPoolExecutor(2, "r3serve-text")

    def begin_loading(self) -> None:
        """Load the tokenizer in the background; whether there is one is seen when it is needed."""
        self._threads.submit(self._load)

    async def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens, with those that the tokenizer begins a text with."""
        return await self._in_thread(self._tokenize, text, True)

    async def render(
        self, messages: Messages, tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> list[int]:
        """Return a chat's tokens, up to where the answer begins."""
        return await self._in_thread(self._render, messages, tools, options)

    async def loaded(self) -> "Prompts":
        """Return this, with the tokenizer loaded, so that what is not async is quick."""
        await self._in_thread(self._load)
        return self

    def detokenize(self, ids: list[int]) -> str:
        """Return tokens as text, special ones too."""
        return str(
            self._load().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def token(self, token_id: int) -> str:
        """Return one token as the vocabulary spells it."""
        return self._load().convert_ids_to_tokens(token_id) or ""

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _load(self) -> Any:
        with self._loading:
            if self._tokenizer is None:
                from transformers import AutoTokenizer

                try:
                    self._tokenizer = AutoTokenizer.from_pretrained(
                        self._model, local_files_only=True
                    )
                except (OSError, ValueError) as error:
                    raise InvalidRequest(
                        f"this model has no tokenizer, so only input_ids can be sent ({error})"
                    ) from None
            return self._tokenizer

    def _tokenize(self, text: str, special: bool) -> list[int]:
        tokenizer = self._load()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"expected text, got half a character: {error.reason}") from None
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _render(
        self, messages: Messages, tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> list[int]:
        if taken := _NOT_FOR_CLIENTS.intersection(options):
            raise InvalidRequest(f"chat_template_kwargs may not set {sorted(taken)}")
        tokenizer = self._load()
        if not tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template: send input_ids, or a prompt")
        chat = [_plain(message, index) for index, message in enumerate(messages)]
        try:
            text = tokenizer.apply_chat_template(
                chat, tools=tools, add_generation_prompt=True, tokenize=False, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template cannot render these messages:"
                f" {type(error).__name__}: {str(error)[:200]}"
            ) from None
        return self._tokenize(str(text), False)


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a message as templates expect it: text as one string, arguments as objects."""
    if not isinstance(message.get("role"), str):
        raise InvalidRequest(f"messages.{index}.role: expected a string")
    plain = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
            raise InvalidRequest(f"messages.{index}.content: expected text parts only")
        plain["content"] = "\n".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidRequest(f"messages.{index}.content: expected a string or text parts")
    if isinstance(calls := message.get("tool_calls"), list):
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def _with_arguments(call: Any) -> Any:
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    if not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}}
