"""Characters that several tokens make together."""

import torch

from dft_lightning.insight.sample import Vocabulary

PARTS = ["a", "\ufffd", "\ufffd", "\ufffd", " b"]
WHOLE = {(1,): "\ufffd", (1, 2): "\ufffd\ufffd", (1, 2, 3): "你", (3,): "\ufffd"}


def vocabulary():
    return Vocabulary(PARTS, torch.zeros(len(PARTS)), lambda ids: WHOLE.get(tuple(ids), "\ufffd" * len(ids)))


def test_they_stand_with_the_last_of_these():
    assert vocabulary().texts_of([0, 1, 2, 3, 4, 0]) == ["a", "·", "·", "你", " b", "a"]


def test_bytes_that_never_become_one_are_given_up():
    """After eight tokens it is no character any more."""
    shown = vocabulary().texts_of([3] * 9 + [0])
    assert shown[:7] == ["·"] * 7
    assert shown[7] == "\ufffd" * 8


def test_with_a_real_tokenizer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2_5")
    text = "你好，世界 😀 naïve ≤ x"
    shown = Vocabulary.of(tokenizer).texts_of(tokenizer(text)["input_ids"])
    assert "".join(part for part in shown if part != "·") == text


def test_a_part_stands_with_what_it_is_of():
    ids = [0, 1, 2, 3, 4]
    assert [vocabulary().text_at(ids, place) for place in range(5)] == ["a", "·你", "·你", "你", " b"]
    assert vocabulary().text_at([3] * 3, 1) == "·"
