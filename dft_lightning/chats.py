"""What a conversation has to be, so that something can be learned from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

MOST_CHARACTERS = 1 << 22  # of a text: at 10 million blanks tokenizers' regular expressions panic, past every `except`

TOOL_CALLS = ("tool_calls", "function_call", "function_calls")
REASONING = ("reasoning_content", "reasoning", "thinking")
TOOL_RESULTS = ("tool", "function", "observation", "function_response", "tool_response", "ipython")

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


def refuse_unsupported(message: Mapping[str, Any]) -> None:
    """Raises `UnusableRow` for what messages have elsewhere, and what cannot be trained on yet."""
    role, content = message.get("role"), message.get("content")
    if role in TOOL_RESULTS:
        raise UnusableRow("the result of a tool is not supported", f"a message of the role {role}")
    calls = next((key for key in TOOL_CALLS if message.get(key)), None)
    if calls or role == "function_call":
        raise UnusableRow("tool calls are not supported", f"the key {calls}" if calls else f"the role {role}")
    if role == "developer":
        raise UnusableRow("the role developer is not supported", "write system in its place")
    if key := next((key for key in REASONING if message.get(key)), None):
        advice = f"to train on the content alone, set --data.ignore '[{key}]'"
        raise UnusableRow("reasoning outside the content is not supported", f"the key {key}; {advice}")
    if isinstance(content, list) and any(isinstance(part, Mapping) for part in content):
        raise UnusableRow("content in parts is not supported", "write their texts as one text")


def checked(messages: Sequence[Message], system_prompt: str | None) -> Chat:
    """The messages as roles and contents alone, behind the system prompt where they have none of their own.

    Raises:
        UnusableRow: they are not such messages, or none that a tokenizer can read.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise UnusableRow("not a list of messages", type(messages).__name__)
    for message in messages:
        refuse_unsupported(message)
        if message.get("role") not in ("system", "user", "assistant"):
            raise UnusableRow("a role other than system, user, assistant", repr(message.get("role")))
        if not isinstance(content := message.get("content"), str):
            raise UnusableRow("content that is not a text", type(content).__name__)
        if len(content) > MOST_CHARACTERS:
            raise UnusableRow("a text longer than tokenizers stand", f"{len(content)} of {MOST_CHARACTERS} characters")
        if content.encode(errors="replace") != content.encode(errors="ignore"):
            raise UnusableRow("lone surrogates, which no tokenizer can encode")
    chat = [{"role": message["role"], "content": message["content"]} for message in messages]
    if system_prompt is not None and all(message["role"] != "system" for message in chat):
        chat.insert(0, {"role": "system", "content": system_prompt})
    return chat
