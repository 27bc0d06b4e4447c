"""What a conversation has to be, so that something can be learned from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

MOST_CHARACTERS = 1 << 22  # of a text: at 10 million blanks tokenizers' regular expressions panic, past every `except`

Message: TypeAlias = Mapping[str, str]
Chat: TypeAlias = list[dict[str, str]]


class UnusableRow(ValueError):  # noqa: N818 - a row's verdict, counted more often than raised
    """A row that cannot be learned from. `reason` is constant, for counting; `detail` tells about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def turns(*texts: str) -> Chat:
    """A chat in which the user says each text, and the assistant the same."""
    return [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]


def checked(messages: Sequence[Message], system_prompt: str | None) -> Chat:
    """The messages as roles and contents alone, behind the system prompt where they have none of their own.

    Raises:
        UnusableRow: they are not such messages, or none that a tokenizer can read.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise UnusableRow("not a list of messages", type(messages).__name__)
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant"):
            raise UnusableRow("a role other than system, user, assistant", repr(message.get("role")))
        if not isinstance(content := message.get("content"), str):
            raise UnusableRow("content that is not a text", type(content).__name__)
        if any(message.get(part) for part in ("tool_calls", "reasoning_content", "reasoning", "thinking")):
            raise UnusableRow("tool calls or reasoning outside the content")
        if len(content) > MOST_CHARACTERS:
            raise UnusableRow("a text longer than tokenizers stand", f"{len(content)} of {MOST_CHARACTERS} characters")
        if content.encode(errors="replace") != content.encode(errors="ignore"):
            raise UnusableRow("lone surrogates, which no tokenizer can encode")
    chat = [{"role": message["role"], "content": message["content"]} for message in messages]
    if system_prompt is not None and all(message["role"] != "system" for message in chat):
        chat.insert(0, {"role": "system", "content": system_prompt})
    return chat
