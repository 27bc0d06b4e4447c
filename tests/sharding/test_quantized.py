"""A base in 4 bits beside others of its kind: each rank holds it whole."""

import pytest
import torch
from conftest import sums, write_jsonl
from exactness import GRADIENT, relative
from harness import fit
from quantized import needs_bitsandbytes, saved
from ranks import start

from dft_lightning.adapters import LoRA

OPTIONS = {"module": {"lora": LoRA(rank=4), "quantization": "nf4"}, "data": {"micro_batch_size": 4}}


@needs_bitsandbytes
@pytest.mark.slow
def test_the_gradient_of_two_ranks_is_that_of_one(tmp_path):
    saved(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", sums(26))
    start(2, __file__, "on_ranks", tmp_path)
    alone = fit(tmp_path / "model", tmp_path / "rows.jsonl", **OPTIONS)[1].gradients
    found = torch.load(tmp_path / "gradients.pt")
    assert len(found) == len(alone)
    for ours, truth in zip(found, alone, strict=True):
        assert relative(ours, truth) < GRADIENT


def on_ranks(folder):
    """The run by ddp."""
    _, recorder, trainer = fit(folder / "model", folder / "rows.jsonl", devices=2, strategy="ddp", **OPTIONS)
    if trainer.is_global_zero:
        torch.save(recorder.gradients, folder / "gradients.pt")
