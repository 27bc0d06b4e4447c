"""Which options render what a chat template does not: each is tried before it is advised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dft_lightning.chats import Message, UnusableRow
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.rendering import ChatRenderer


def alternatives(
    kind: Callable[..., ChatRenderer],
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    templates: dict[str, str],
    messages: Sequence[Message],
) -> str:
    """Which one changed option renders these messages, as advice. Each of them is tried."""
    own, found = tokenizer.chat_template, []
    ways: dict[str, tuple[Any, dict[str, Any]]] = {}
    if options["end_of_response"] != "eos" and tokenizer.eos_token is not None:
        ways["--data.end_of_response eos"] = own, options | {"end_of_response": "eos"}
    ways |= {f"--model.chat_template {name}": (template, options) for name, template in templates.items()}
    try:
        for way, (template, chosen) in ways.items():
            tokenizer.chat_template = template
            try:
                kind(tokenizer, **chosen, advise=False).render(messages)
            except (UserError, UnusableRow):
                continue
            found.append(way)
    finally:
        tokenizer.chat_template = own
    if not found:
        return "none of the shipped templates helps: give a .jinja file as model.chat_template, or write other rows"
    return f"this works with {' or '.join(found)}"
