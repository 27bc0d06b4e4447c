"""What is exported gives the logits of training, by the callback at the end of a run and by `dft export` after it.

Where not said otherwise to the bit. Merged, (W + BA)x is computed in another order than Wx + BAx: some units of float32
rounding of the logits.
"""

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from harness import fit
from peft import PeftModel
from quantized import BIG, needs_bitsandbytes
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.adapters import LoRA
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.loading import ModelSource, load_model

IDS = torch.arange(3, 40)[None]
# so that the trained model differs
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), "warmup_ratio": 0.0}
GEMMA = {"family": "gemma2"}
CASES = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "soft-cap": (GEMMA, {}),
    "LoRA, tied": ({"tie_word_embeddings": True}, {"lora": LoRA(rank=4)}),
    "LoRA, soft-cap": (GEMMA, {"lora": LoRA(rank=4)}),
    "rank-stabilised": ({}, {"lora": LoRA(rank=4, rslora=True)}),
    "DoRA": ({}, {"lora": LoRA(rank=4, dora=True)}),
    "DoRA, soft-cap": (GEMMA, {"lora": LoRA(rank=4, dora=True, rslora=True)}),
}
FOUR_BITS = {
    "LoRA": ({}, {"lora": LoRA(rank=4), "quantization": "nf4"}),
    "DoRA, tied": ({"tie_word_embeddings": True}, {"lora": LoRA(rank=4, dora=True), "quantization": "nf4"}),
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def exported(tmp_path, rows_file, changes, module):
    """The live model's logits, those of its base, and the folders of both ways to export."""
    tiny_model(**changes).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    saving = {"enable_checkpointing": True, "callbacks": [Checkpoints(), Export(merge_lora=True)]}
    finetuner = fit(tmp_path / "model", rows_file, module=FAST | module, default_root_dir=run, **saving)[0]
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["export", last, str(tmp_path / "out")]) == 0
    folders = {"": [run / "export", tmp_path / "out"], "merged": []}
    if "lora" in module:
        assert main(["export", last, str(tmp_path / "merged"), "--merge_lora", "true"]) == 0
        folders["merged"] = [run / "export-merged", tmp_path / "merged"]
    return logits(finetuner.model), folders


def assert_merged(folders, live):
    for folder in folders:
        merged = logits(AutoModelForCausalLM.from_pretrained(folder))
        torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_whole_adapter_and_merged(rows_file, tmp_path, name):
    changes, module = CASES[name]
    live, folders = exported(tmp_path, rows_file, changes, module)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (live - logits(base)).abs().max() > 1e-2
    for folder in folders[""]:
        assert (folder / "model.safetensors").exists() is not ("lora" in module)
        back = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), folder)
            if "lora" in module
            else AutoModelForCausalLM.from_pretrained(folder)
        )
        assert torch.equal(logits(back), live)
    assert_merged(folders["merged"], live)


@needs_bitsandbytes
@pytest.mark.parametrize("name", FOUR_BITS)
def test_beside_a_base_in_4_bits(rows_file, tmp_path, name):
    """An adapter is as learnt beside those 4 bits alone; merged, into the weights that they stand for."""
    changes, module = FOUR_BITS[name]
    live, folders = exported(tmp_path, rows_file, BIG | changes, module)
    for folder in folders[""]:
        assert not (folder / "model.safetensors").exists()
        packed = load_model(ModelSource(str(tmp_path / "model"), quantization="nf4"))
        assert torch.equal(logits(PeftModel.from_pretrained(packed, folder)), live)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (logits(PeftModel.from_pretrained(plain, folder)) - live).abs().max() > 1e-2
        assert "bnb_4bit_quant_type" in (folder / "README.md").read_text()
    assert_merged(folders["merged"], live)
    for folder in folders["merged"]:
        assert "quantization_config" not in (folder / "config.json").read_text()
        assert "what those stand for" in (folder / "README.md").read_text()


@needs_bitsandbytes
def test_into_another_base_it_is_not_merged(rows_file, tmp_path, capsys):
    exported(tmp_path, rows_file, BIG, FOUR_BITS["LoRA"][1])
    (tmp_path / "model").rename(tmp_path / "moved")
    other = tiny_model(**BIG)
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] *= -1
    other.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "new")]
    assert main([*command, "--merge_lora", "true"]) == 2
    assert "no longer those that the adapter was trained beside" in capsys.readouterr().err
    assert main([*command, "--merge_lora", "true", "--model_name", str(tmp_path / "moved")]) == 0
