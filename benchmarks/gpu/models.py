"""Models with random weights, their tokenizer and the rows to train on, all made on the spot."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

#: Widths: hidden size, intermediate size, layers, heads, key-value heads, vocabulary (of the tokenizer, or more).
Size = tuple[int, int, int, int, int, int]
SMALL: Size = (256, 512, 2, 4, 2, 1024)
TINY: Size = (64, 128, 2, 4, 2, 512)
#: As wide and deep as SmolLM2-135M.
REAL: Size = (576, 1536, 30, 9, 3, 49152)
ROWS = 96


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 512 tokens, trained on the practice problems, with the special tokens of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((row["problem"] + " " + row["solution"] for row in problems()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def problems() -> list[dict[str, Any]]:
    """Rows of the project's own generator."""
    from dft_lightning.data.problems import practice_problems

    return list(practice_problems(ROWS))


def config(size: Size = SMALL, family: str = "Llama", **changes: Any) -> Any:
    """A model's configuration."""
    import transformers

    hidden, inner, layers, heads, groups, vocabulary = size
    return getattr(transformers, f"{family}Config")(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=4096, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, **changes,
    )  # fmt: skip


def save(folder: Path, size: Size = SMALL, **changes: Any) -> Path:
    """A Llama in float32 and the tokenizer, as a folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config(size, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_rows(path: Path) -> Path:
    """The practice problems as a file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in problems()))
    return path
