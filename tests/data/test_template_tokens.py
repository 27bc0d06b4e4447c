"""Special tokens that a chosen chat template writes, and that the tokenizer reads as text."""

import pytest
from conftest import tiny_tokenizer

from dft_lightning.data.rendering import TEMPLATES, load_chat_template
from dft_lightning.data.template_tokens import unknown_tokens
from dft_lightning.models import ModelSource, load_tokenizer

UNKNOWN = {
    "chatml": set(),
    "deepseek_math": set(),
    "llama3": {"<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template(name):
    tokenizer = tiny_tokenizer()
    found = unknown_tokens(load_chat_template(name), tokenizer)
    assert found.keys() == UNKNOWN[name]
    assert all(count == len(tokenizer.tokenize(token)) > 1 for token, count in found.items())
    tokenizer.add_tokens([*found])
    assert not unknown_tokens(load_chat_template(name), tokenizer)


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_they_are_named(model_dir, recwarn, name):
    load_tokenizer(ModelSource(str(model_dir)), name)
    said = [str(each.message) for each in recwarn if "model.chat_template writes" in str(each.message)]
    assert len(said) == (name == "llama3")
    assert all("<|start_header_id|>" in text and "--model.resize_embeddings true" in text for text in said)
