"""What kind of token each id is, by its text; for byte-level BPE, SentencePiece and the real tokenizers."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer

from dft_lightning.token_classes import CLASSES, class_of, class_of_text, token_texts

BY_HAND = {
    "function word": [" the", "Let", " therefore", "a", "I", "'s", "’re", " If"],
    "other word": [" triangle", "Theorem", "ization", "x", "n", "naïve", "数", "हिन्दी", " frac", "text", "'clock"],
    "digit": ["7", " 12", "3.14", "1,000", "٣"],
    "operator": ["+", " =", "^{", ")=", "->", "≤", "<=", "×", "_", " -", "|", "√"],
    "LaTeX command": ["\\", "\\frac", " \\", "\\boxed", "\\(", "\\\\\n", "frac", "sqrt", "}{\\", "\\%"],
    "punctuation": [",", ".\n", " (", "}{", "$$", "?", "“", ":", "。"],
    "white space": [" ", "\n\n", "\t", "\u00a0"],
    "other": ["", "x2", "(x", "½", "\ufffd", "😀", ".append", "\x00"],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    assert {text: class_of_text(text) for text in BY_HAND[name]} == dict.fromkeys(BY_HAND[name], name)


def test_every_class_has_a_number():
    assert set(BY_HAND) | {"stop"} == set(CLASSES)
    assert len(CLASSES) == len(set(CLASSES)) < 256


def classes(tokenizer, **options) -> list[str]:
    return [CLASSES[number] for number in class_of(tokenizer, **options).tolist()]


class TestByteLevel:
    def test_the_table(self):
        tokenizer = tiny_tokenizer()
        named = classes(tokenizer)
        assert len(named) == len(tokenizer)
        assert class_of(tokenizer).dtype == torch.uint8
        ids = tokenizer("the answer, 12 + 1\n")["input_ids"]
        assert {"function word", "punctuation", "digit", "operator", "white space"} <= {named[i] for i in ids}
        assert named[tokenizer.eos_token_id] == named[tokenizer.convert_tokens_to_ids("<|im_start|>")] == "stop"
        assert Counter(named)["stop"] == 3

    def test_texts_are_those_of_the_decoder(self):
        tokenizer = tiny_tokenizer()
        texts = token_texts(tokenizer)
        assert texts == [tokenizer.decode([index]) for index in range(len(tokenizer))]
        assert " the" in texts or "the" in texts
        assert "\n" in texts
        assert "\ufffd" in texts

    def test_rows_of_the_head_without_a_token(self):
        tokenizer = tiny_tokenizer()
        count = len(tokenizer)
        assert classes(tokenizer, size=count + 7)[count:] == ["other"] * 7
        assert classes(tokenizer, size=50) == classes(tokenizer)[:50]


def sentencepiece():
    """Pieces as a SentencePiece tokenizer writes them, with bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xE2>", "▁the", "the", "▁sum", "▁", "▁▁", "▁\\", "frac", "1", "="]
    backend = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_sentencepiece():
    assert classes(sentencepiece()) == [
        *["stop"] * 3,
        "white space",
        "other",  # the first byte of a longer character
        *["function word"] * 2,
        "other word",
        *["white space"] * 2,
        *["LaTeX command"] * 2,
        "digit",
        "operator",
    ]
    assert token_texts(sentencepiece())[3:9] == ["\n", "\ufffd", " the", "the", " sum", " "]


def test_a_special_token_may_look_like_the_other_kind():
    """DeepSeek's end of a turn has a "▁" in it, and its vocabulary is byte-level."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["▁end", "▁of", "▁sentence"]})
    tokenizer.add_tokens(["<think>"])
    named = dict(zip(token_texts(tokenizer), classes(tokenizer), strict=True))
    assert named["▁end"] == "stop"
    assert named["<think>"] == "other"
    assert " the" in named or "the" in named


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2"])
def test_real_tokenizers(shared, name):
    from transformers import AutoTokenizer

    folder = Path(shared) / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"needs the tokenizer {name} in shared/tokenizers beside the repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    named = classes(tokenizer)
    assert len(named) == len(tokenizer) > 100_000
    text = "Since the ratio is \\frac{1}{2}, the answer is \\boxed{42}.\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer)
    assert "".join(texts[index] for index in ids) == text
    found = {texts[index].strip(): named[index] for index in ids}
    expected = {"Since": "function word", "the": "function word", "ratio": "other word", "answer": "other word"}
    assert expected.items() <= found.items()
    commands = [piece for piece, kind in found.items() if kind == "LaTeX command"]
    assert any("frac" in piece for piece in commands)
    assert any("boxed" in piece for piece in commands)
    assert all(kind == "digit" for piece, kind in found.items() if piece.isdigit())
    assert named[tokenizer.eos_token_id] == "stop"
    shares = Counter(named)
    assert shares["other word"] > len(named) / 2
    assert all(shares[kind] > 10 for kind in CLASSES if kind != "digit")
