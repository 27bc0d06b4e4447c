"""What a tokenizer cannot read: text at all, where its files are missing, or the special tokens of a chat template."""

import re
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")  # as <|im_start|>; other brackets are plain text in many templates


_TEXT = "Some text: 1 + 1 = 2."


def check_reads_text(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes of many families where no files are."""
    ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    if set(ids) <= {tokenizer.unk_token_id, *tokenizer.all_special_ids}:
        raise UserError(
            f"the tokenizer of {name!r} reads text as unknown or as nothing ({len(tokenizer)} tokens), as where its "
            "files (tokenizer.json, or tokenizer.model, or vocab.json and merges.txt) are missing: copy them there, or "
            "name the folder or model that has them in --model.tokenizer_name"
        )


def unknown_tokens(template: str, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """What looks like a special token in a template, but is text to the tokenizer: by name, as how many tokens."""
    known = tokenizer.get_vocab()
    return {
        name: len(tokenizer(name, add_special_tokens=False)["input_ids"])
        for name in dict.fromkeys(_TOKEN.findall(template))
        if name not in known
    }


def warn_of_unknown_tokens(template: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Say which of a chosen template's tokens the tokenizer reads as text, as it reads that of a user."""
    if unknown := unknown_tokens(template, tokenizer):
        listed = ", ".join(f"{name} ({count} tokens)" for name, count in unknown.items())
        rank_zero_warn(
            f"model.chat_template writes {listed}, which the tokenizer does not have as single tokens: the model sees "
            "them as text. To add them, save a tokenizer with these tokens in a folder, and set "
            "--model.tokenizer_name to it and --model.resize_embeddings true"
        )
