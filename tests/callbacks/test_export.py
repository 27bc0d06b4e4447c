"""What is exported loads with transformers and gives the live model's logits."""

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from harness import fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_lightning import FineTuner
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA

IDS = torch.arange(3, 40)[None]
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "warmup_ratio": 0.0}  # so that the trained model differs


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def run(folder, rows_file, tmp_path, *callbacks, **more):
    more = {"enable_checkpointing": any(isinstance(callback, Checkpoints) for callback in callbacks)} | more
    return fit(folder, rows_file, callbacks=list(callbacks), default_root_dir=tmp_path, **({"module": FAST} | more))[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_model(rows_file, tmp_path, tied):
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    finetuner = run(tmp_path / "model", rows_file, tmp_path, Export())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(back), logits(finetuner.model))
    assert not torch.allclose(logits(back), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), atol=1e-3)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is tied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template == finetuner.tokenizer.chat_template
    assert tokenizer.get_vocab() == finetuner.tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_the_best_model_is_that_of_its_checkpoint(model_dir, rows_file, tmp_path, monkeypatch, lora):
    seen = []

    def log(self, stage):
        seen.append(logits(self.model))
        self.model.train()
        self.log(f"{stage}/p_mean", [0.1, 0.9, 0.2][len(seen) - 1])

    monkeypatch.setattr(FineTuner, "_log_means", log)
    more = {"module": FAST | {"lora": lora}, "data": {"val_size": 2}, "val_check_interval": 1}
    finetuner = run(
        model_dir,
        rows_file,
        tmp_path,
        Checkpoints(),
        Export(which="best", merge_lora=True, stop_tokens=["the"]),
        **more,
    )
    assert len(seen) == 3
    if lora is None:
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    else:
        from peft import AutoPeftModelForCausalLM

        back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export-merged")
        torch.testing.assert_close(logits(merged), seen[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(back), seen[1])
    assert not torch.equal(logits(finetuner.model), seen[1])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / ("export" if lora is None else "export-merged"))
    assert len(whole.generation_config.eos_token_id) == 2


def test_no_best_checkpoint_is_said_and_the_last_is_exported(model_dir, rows_file, tmp_path):
    with pytest.warns(UserWarning, match=r"no .*best.ckpt .*exporting the last"):
        finetuner = run(model_dir, rows_file, tmp_path, Export(which="best"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), logits(finetuner.model))


@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=4, rslora=True), LoRA(rank=4, dora=True)])
def test_an_adapter_and_the_merged_model(model_dir, rows_file, tmp_path, lora):
    """Merged, (W + BA)x is computed in another order than Wx + BAx: some units of float32 rounding of the logits."""
    from peft import PeftModel

    module = FAST | {"lora": lora}
    finetuner = run(model_dir, rows_file, tmp_path, Export(merge_lora=True), module=module)
    assert not (tmp_path / "export" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    before = logits(base)
    live = logits(finetuner.model)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "export")), live)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "export-merged"))
    torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))
    assert (live - before).abs().max() > 1e-2
    assert finetuner.model.peft_config  # the live model keeps its adapter


def test_stop_tokens_end_a_generation(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, Export(stop_tokens=["<|endoftext|>", "<|im_end|>", "<|endoftext|>"]))
    vocabulary = tiny_tokenizer().get_vocab()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert back.generation_config.eos_token_id == [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]


def test_an_unknown_stop_token_is_refused_before_training(model_dir, rows_file, tmp_path):
    with pytest.raises(UserError, match=r"export.stop_tokens: \['<stop>'\] are no tokens") as caught:
        run(model_dir, rows_file, tmp_path, Export(stop_tokens=["<stop>", "<|im_end|>"]), max_steps=1)
    assert "training_step" not in "".join(str(entry.name) for entry in caught.traceback)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("more", [{"callback": Export(False)}, {"callback": Export(), "fast_dev_run": True}])
def test_nothing_is_exported_where_it_is_off(model_dir, rows_file, tmp_path, more):
    more = dict(more)
    run(model_dir, rows_file, tmp_path, more.pop("callback"), **more)
    assert not (tmp_path / "export").exists()


def test_an_export_replaces_an_earlier_one(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, Export(), max_steps=1)
    stale = tmp_path / "export" / "model-00009-of-00009.safetensors"
    stale.write_text("")
    (tmp_path / "export" / "notes.md").write_text("by hand")
    (tmp_path / "export" / "config.json").unlink()
    run(model_dir, rows_file, tmp_path, Export(), max_steps=1)
    assert not stale.exists()
    assert (tmp_path / "export" / "config.json").exists()
    assert (tmp_path / "export" / "notes.md").read_text() == "by hand"
    assert not [*tmp_path.glob(".export.*")]


def test_an_export_that_somebody_else_made_stays(model_dir, rows_file, tmp_path):
    """Without a marker, a folder is known by its model card."""
    (tmp_path / "export").mkdir()
    for name in ("config.json", "notes.md"):
        (tmp_path / "export" / name).write_text("by hand")
    run(model_dir, rows_file, tmp_path, Export(), max_steps=1)
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert (tmp_path / "export" / "config.json.kept").read_text() == "by hand"
    assert (tmp_path / "export" / "notes.md").read_text() == "by hand"
