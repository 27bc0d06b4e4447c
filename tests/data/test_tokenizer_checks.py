"""A tokenizer whose files are missing, and special tokens of a chat template that a tokenizer reads as text."""

import pytest
import transformers
from conftest import tiny_config, tiny_tokenizer

from dft_lightning.data.rendering import TEMPLATES, load_chat_template
from dft_lightning.data.tokenizer_checks import unknown_tokens
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_tokenizer

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


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "cohere", "phi", "mistral", "GPT2", "OPT", "GPTNeoX"])
def test_a_folder_without_tokenizer_files(tmp_path, family):
    """Of some families transformers refuses it, of others it makes a tokenizer of a few special tokens."""
    found = tiny_config(family) if family.islower() else getattr(transformers, f"{family}Config")()
    found.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer of"):
        load_tokenizer(ModelSource(str(tmp_path)), "chatml")
