"""`dft export`: what it writes gives the logits of training, and everything it cannot do is one line."""

import copy
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model, tiny_tokenizer
from harness import fit, logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, Mixed

IDS = torch.arange(3, 40)[None]
# so that the trained model differs
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), "warmup_ratio": 0.0}
LORA = {"lora": LoRA(rank=4)}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def saved(folder, **changes):
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def trained(model, rows_file, run_dir, module=None, **more):
    """The live model after a run, whose folder is `run_dir`."""
    options = {"module": FAST | (module or {}), "enable_checkpointing": True, "default_root_dir": run_dir} | more
    return fit(model, rows_file, callbacks=[Checkpoints()], **options)[0]


def last(run_dir) -> str:
    return str(run_dir / "checkpoints" / "last.ckpt")


MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "soft-cap, tied": {"family": "gemma2", "tie_word_embeddings": True},
    "soft-cap, untied": {"family": "gemma2", "tie_word_embeddings": False},
    "logit scale": {"family": "cohere"},
}


class TestLogits:
    @pytest.mark.parametrize("name", MODELS)
    def test_are_those_of_training_to_the_bit(self, rows_file, tmp_path, name):
        model = saved(tmp_path / "model", **MODELS[name])
        finetuner = trained(model, rows_file, tmp_path / "run")
        assert main(["export", last(tmp_path / "run"), str(tmp_path / "out")]) == 0
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(back), logits(finetuner.model))
        assert not torch.allclose(logits(back), logits(AutoModelForCausalLM.from_pretrained(model)), atol=1e-3)
        tied = back.get_output_embeddings().weight is back.get_input_embeddings().weight
        assert tied is finetuner.model.config.tie_word_embeddings

    def test_in_the_precision_of_the_run(self, model_dir, rows_file, tmp_path):
        finetuner = trained(model_dir, rows_file, tmp_path / "run", precision="bf16-true")
        assert main(["export", last(tmp_path / "run"), str(tmp_path / "out")]) == 0
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert back.dtype == torch.bfloat16
        assert torch.equal(logits(back), logits(finetuner.model))

    def test_with_the_chat_template_of_the_run(self, model_dir, rows_file, tmp_path):
        finetuner = trained(model_dir, rows_file, tmp_path / "run", {"chat_template": "chatml"}, max_steps=1)
        assert main(["export", last(tmp_path / "run"), str(tmp_path / "out")]) == 0
        template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
        assert template == finetuner.tokenizer.chat_template != tiny_tokenizer().chat_template

    @pytest.mark.parametrize("name", ["untied", "soft-cap, tied"])
    def test_of_an_adapter_as_such(self, rows_file, tmp_path, name):
        from peft import AutoPeftModelForCausalLM

        model = saved(tmp_path / "model", **MODELS[name])
        finetuner = trained(model, rows_file, tmp_path / "run", LORA)
        assert main(["export", last(tmp_path / "run"), str(tmp_path / "out")]) == 0
        assert not (tmp_path / "out" / "model.safetensors").exists()
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), logits(finetuner.model))

    @pytest.mark.parametrize("name", ["untied", "soft-cap, tied"])
    def test_of_a_merged_adapter(self, rows_file, tmp_path, name):
        """To the bit those of a merge in the live model; (W + BA)x and Wx + BAx differ by some units of rounding."""
        model = saved(tmp_path / "model", **MODELS[name])
        finetuner = trained(model, rows_file, tmp_path / "run", LORA)
        assert main(["export", last(tmp_path / "run"), str(tmp_path / "out"), "--merge_lora", "true"]) == 0
        ours, live = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(finetuner.model)
        assert torch.equal(ours, logits(copy.deepcopy(finetuner.model).merge_and_unload()))
        torch.testing.assert_close(ours, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))
        assert (live - logits(AutoModelForCausalLM.from_pretrained(model))).abs().max() > 1e-2


@pytest.fixture(scope="class")
def run_dir(model_dir, tmp_path_factory):
    """A run of one step of `model_dir`, with validation and events."""
    from conftest import sums, write_jsonl

    folder = tmp_path_factory.mktemp("run")
    rows = write_jsonl(folder / "rows.jsonl", sums(16))
    mix = Mixed(DFT(0.1), share=0.25)
    more = {"logger": logger(folder), "data": {"val_size": 4}, "max_steps": 1, "val_check_interval": 1}
    options = {"enable_checkpointing": True, "default_root_dir": folder} | more
    fit(model_dir, rows, mix, callbacks=[Checkpoints()], **options)
    config = {"data": {"class_path": "NuminaMathDataModule", "init_args": {"path": "rows.jsonl", "val_path": None}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


class TestFolder:
    def test_has_shards_tokenizer_and_generation_config(self, run_dir, model_dir, tmp_path, capsys):
        stop = ["--stop_tokens", "<|endoftext|>", "<|im_end|>", "--max_shard_size", "40KB"]
        assert main(["export", last(run_dir), str(tmp_path / "new" / "out"), *stop]) == 0
        out = tmp_path / "new" / "out"
        assert "Wrote a model" in capsys.readouterr().out
        assert len([*out.glob("model-*.safetensors")]) > 1
        assert (out / "model.safetensors.index.json").exists()
        back, ours = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        vocabulary = tiny_tokenizer().get_vocab()
        assert back.generation_config.eos_token_id == [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]]
        assert ours.chat_template == tiny_tokenizer().chat_template
        assert {path.name for path in out.parent.iterdir()} == {"out"}

    def test_may_be_read_by_whom_the_umask_allows(self, run_dir, tmp_path):
        before = os.umask(0o027)
        try:
            assert main(["export", last(run_dir), str(tmp_path / "out")]) == 0
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
        assert modes["model.safetensors"] == modes["config.json"] == 0o640
        assert set(modes.values()) == {0o640}

    def test_has_a_card(self, run_dir, tmp_path):
        assert main(["export", last(run_dir), str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front == {"library_name": "transformers", "pipeline_tag": "text-generation",
                         "tags": ["dft-lightning", "Mixed"]}  # fmt: skip
        for said in ("Mixed(of=DFT(floor=0.1)", "share=0.25", "| Normalised by | tokens |", "1 of 1", "val/nll",
                     "val/p_mean", "path: rows.jsonl", "global_batch_size | 8 |", "| torch | "):  # fmt: skip
            assert said in text, said
        assert "val_path" not in text

    def test_does_not_read_the_optimizer(self, run_dir, tmp_path, monkeypatch):
        """Its tensors stay unread on the disk: the file is mapped, and no more than the weights is taken from it."""
        from dft_lightning.exporting import stored

        seen, load = [], torch.load

        def watched(*args, **options):
            content = load(*args, **options)
            seen.append(options)
            del content["optimizer_states"]
            return content

        monkeypatch.setattr(stored.torch, "load", watched)
        assert main(["export", last(run_dir), str(tmp_path / "out")]) == 0
        assert seen == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


class TestRefusals:
    def fails(self, capsys, *arguments, code=2):
        capsys.readouterr()
        try:
            left = main(["export", *map(str, arguments)])
        except SystemExit as leaving:
            left = leaving.code
        said = capsys.readouterr().err.strip()
        assert left == code
        assert said.startswith("dft: error: ")
        assert "\n" not in said
        return said

    def test_what_is_no_checkpoint_of_ours(self, run_dir, tmp_path, capsys):
        whole = Path(last(run_dir)).read_bytes()
        (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.ckpt").write_text("no checkpoint")
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        out = tmp_path / "out"
        assert "there is no checkpoint" in self.fails(capsys, tmp_path / "missing.ckpt", out)
        assert "is a folder" in self.fails(capsys, tmp_path, out)
        for name in ("cut.ckpt", "text.ckpt"):
            assert "damaged, or no checkpoint" in self.fails(capsys, tmp_path / name, out)
        assert "not written by a training run" in self.fails(capsys, tmp_path / "other.ckpt", out)
        assert not out.exists()

    def test_a_folder_that_exists(self, run_dir, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("")
        assert "out exists" in self.fails(capsys, last(run_dir), tmp_path / "out")
        assert (tmp_path / "out" / "precious").exists()

    def test_options_that_mean_nothing(self, run_dir, tmp_path, capsys):
        out = tmp_path / "out"
        assert "without adapter" in self.fails(capsys, last(run_dir), out, "--merge_lora", "true")
        assert "neither true nor false" in self.fails(capsys, last(run_dir), out, "--merge_lora", "perhaps")
        assert "no tokens of the tokenizer" in self.fails(capsys, last(run_dir), out, "--stop_tokens", "<stop>")
        assert "required: OUT" in self.fails(capsys, last(run_dir))

    def test_a_base_model_that_is_gone_or_another(self, rows_file, tmp_path, capsys):
        model, out = saved(tmp_path / "model"), tmp_path / "out"
        trained(model, rows_file, tmp_path / "run", max_steps=1)
        model.rename(tmp_path / "moved")
        assert "cannot load the" in self.fails(capsys, last(tmp_path / "run"), out)
        saved(tmp_path / "wide", hidden_size=48)
        said = self.fails(capsys, last(tmp_path / "run"), out, "--model_name", tmp_path / "wide")
        assert "weights are not those of a model like" in said
        assert main(["export", last(tmp_path / "run"), str(out), "--model_name", str(tmp_path / "moved")]) == 0
