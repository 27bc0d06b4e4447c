"""A LoRA adapter named as the model: trained further, merged, or refused by name."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from quantized import BIG, needs_bitsandbytes
from test_adapters import Watched
from torch import nn
from transformers import AutoModelForCausalLM

from dft_lightning import FineTuner
from dft_lightning.__main__ import main
from dft_lightning.adapter_folders import CONFIG
from dft_lightning.adapters import LoRA
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.weighting import ASFT, ImportanceWeighted

IDS = torch.arange(3, 40)[None]
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "warmup_ratio": 0.0, "lr_schedule": "constant"}
LAYERS = ["q_proj", "down_proj"]
ADAPTERS = {
    "plain": {"target_modules": LAYERS},
    "rslora, patterns": {"target_modules": LAYERS, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora, full copies": {"target_modules": LAYERS, "use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
    "one layer": {"target_modules": LAYERS, "layers_to_transform": [1], "lora_alpha": 32},
}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def adapter(folder, base=None, *, config=None, **options):
    """A trained adapter of peft's own, without tokenizer, beside its base model; the logits of both together."""
    base = base or folder.parent / "base"
    if not base.exists():
        tiny_model(**options.pop("changes", {})).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, config or LoraConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | options)))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.detach().clone() if "magnitude" in name or "modules_to_save" in name else 0.0
            nn.init.normal_(parameter, std=0.1, generator=generator)
            parameter.data += kept
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders and logits of each kind."""
    place = tmp_path_factory.mktemp("adapters")
    return {name: adapter(place / name.replace(", ", "-"), **options) for name, options in ADAPTERS.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(16))


def run(folder, rows, module, **trainer):
    return fit(folder, rows, module=FAST | module, **({"max_steps": 1} | trainer))


class TestTheStart:
    @pytest.mark.parametrize("name", ADAPTERS)
    @pytest.mark.parametrize("how", ["continue", "merge", "merge, new adapter"])
    def test_is_the_adapted_model(self, trained, name, how):
        """Continued to the bit; merged to some roundings of float32, as W + BA is rounded."""
        folder, truth = trained[name]
        lora = LoRA(rank=2) if "new" in how else None
        tuner = FineTuner(str(folder), ImportanceWeighted(), adapter=how.partition(",")[0], lora=lora)
        tuner.configure_model()
        found = logits(tuner.model)
        if how == "continue":
            assert torch.equal(found, truth)
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
        base = logits(AutoModelForCausalLM.from_pretrained(folder.parent / "base"))
        assert (found - base).abs().max() > 1e-2
        learnt = {name for name, p in tuner.model.named_parameters() if p.requires_grad}
        everything = {name for name, _ in tuner.model.named_parameters()}
        assert learnt == (everything if how == "merge" else {n for n in everything if "lora_" in n or "to_save." in n})

    @pytest.mark.parametrize("weighting", [ImportanceWeighted(), ASFT()], ids=lambda one: type(one).__name__)
    @pytest.mark.parametrize(
        ("reference", "precision"), [("auto", "32-true"), ("copy", "32-true"), ("copy", "bf16-true")]
    )
    @pytest.mark.parametrize("name", ["plain", "dora, full copies"])
    def test_is_the_reference(self, trained, rows, name, weighting, reference, precision):
        """Not the base, which is what switching a trained adapter off leaves.

        In the same batch to the bit; out of a cache, whose batches are others, to a hundred roundings of log p.
        """
        how = {"adapter": "continue", "reference": reference}
        given = {"module": FAST | how, "kind": Watched, "max_steps": 1, "precision": precision}
        tuner = fit(trained[name][0], rows, weighting, **given)[0]
        wants_distributions = isinstance(weighting, ASFT)
        assert tuner.reference_in_force == ("cache" if reference == "auto" and not wants_distributions else "copy")
        if not wants_distributions:
            allowed = 0.0 if reference == "copy" else 1e-5
            torch.testing.assert_close(tuner.seen[0], torch.ones_like(tuner.seen[0]), rtol=0, atol=allowed)

    def test_is_what_the_first_loss_is_of(self, trained, rows):
        folder = trained["plain"][0]
        first = {how: run(folder, rows, {"adapter": how})[1].logged[0]["train/nll"] for how in ("continue", "merge")}
        base = run(folder.parent / "base", rows, {})[1].logged[0]["train/nll"]
        assert first["continue"] == pytest.approx(first["merge"], rel=1e-5)
        assert first["merge"] != pytest.approx(base, rel=1e-4)


class TestRuns:
    @pytest.mark.parametrize("name", ADAPTERS)
    @pytest.mark.parametrize("how", ["continue", "merge", "merge, new adapter"])
    def test_what_is_exported_is_what_was_trained(self, trained, rows, tmp_path, name, how):
        """By the callback and from the checkpoint, as such and merged, loaded by plain peft and transformers."""
        lora = {"lora": LoRA(rank=2)} if "new" in how else {}
        saving = {"default_root_dir": tmp_path / "run", "enable_checkpointing": True}
        callbacks = [Checkpoints(), Export(merge_lora=True)]
        module = {"adapter": how.partition(",")[0]} | lora
        live = logits(run(trained[name][0], rows, module, callbacks=callbacks, **saving)[0].model)
        last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert main(["export", last, str(tmp_path / "out")]) == 0
        for folder in (tmp_path / "run" / "export", tmp_path / "out"):
            kind = AutoModelForCausalLM if how == "merge" else AutoPeftModelForCausalLM
            assert (folder / CONFIG).exists() == (how != "merge")
            assert torch.equal(logits(kind.from_pretrained(folder)), live)
        if how != "merge":
            assert main(["export", last, str(tmp_path / "merged"), "--merge_lora", "true"]) == 0
            for folder in (tmp_path / "run" / "export-merged", tmp_path / "merged"):
                merged = logits(AutoModelForCausalLM.from_pretrained(folder))
                torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))

    @pytest.mark.parametrize("name", ["plain", "dora, full copies"])
    @pytest.mark.parametrize("how", ["continue", "merge"])
    def test_resume_to_the_bit(self, trained, rows, tmp_path, name, how):
        """The settings of LoRA come from the folder once more; what was trained is not."""
        options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
        full = run(trained[name][0], rows, {"adapter": how}, max_steps=2, **options)[0]
        keep = ModelCheckpoint(tmp_path, "kept", every_n_train_steps=1)
        run(trained[name][0], rows, {"adapter": how}, callbacks=[keep], **options)
        rest = run(
            trained[name][0], rows, {"adapter": how}, max_steps=2, ckpt_path=str(tmp_path / "kept.ckpt"), **options
        )[0]
        assert all(map(torch.equal, full.model.parameters(), rest.model.parameters()))

    def test_another_choice_is_another_run(self, trained, rows, tmp_path):
        folder = trained["plain"][0]
        options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
        run(folder, rows, {"adapter": "continue"}, callbacks=[Checkpoints()], **options)
        last = str(tmp_path / "checkpoints" / "last.ckpt")
        with pytest.raises(UserError, match=r"model \(adapter\): continue → merge"):
            run(folder, rows, {"adapter": "merge"}, max_steps=2, ckpt_path=last, **options)

    @needs_bitsandbytes
    def test_beside_a_base_in_4_bits(self, tmp_path, rows):
        folder, _ = adapter(tmp_path / "adapter", target_modules=LAYERS, changes=BIG)
        module = {"adapter": "continue", "quantization": "nf4"}
        saving = {"default_root_dir": tmp_path / "run", "enable_checkpointing": True}
        live = logits(run(folder, rows, module, callbacks=[Checkpoints(), Export(merge_lora=True)], **saving)[0].model)
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export-merged"))
        torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))
        with pytest.raises(UserError, match=r"model.quantization is nf4, but model.adapter merge"):
            run(folder, rows, module | {"adapter": "merge", "lora": LoRA()})


class TestTheBase:
    """Where it is, by the adapter's own configuration."""

    @pytest.fixture
    def folder(self, trained, tmp_path):
        shutil.copytree(trained["plain"][0].parent / "base", tmp_path / "models" / "base")
        shutil.copytree(trained["plain"][0], tmp_path / "adapters" / "one")
        return tmp_path / "adapters" / "one"

    def named(self, folder, base, **more):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base} | more))
        tuner = FineTuner(str(folder), ImportanceWeighted(), adapter="continue")
        tuner.configure_model()
        return logits(tuner.model)

    @pytest.mark.parametrize("where", ["adapters/one", ".", "elsewhere"])
    def test_by_a_relative_path(self, trained, folder, tmp_path, monkeypatch, where):
        """From the adapter's folder, whatever the working directory is; or from there."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / where)
        assert torch.equal(self.named(folder, "../../models/base"), trained["plain"][1])
        if where == ".":
            assert torch.equal(self.named(folder, "models/base"), trained["plain"][1])

    def test_in_two_places_it_is_ambiguous(self, folder, tmp_path, monkeypatch):
        shutil.copytree(tmp_path / "models", folder / "models")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"could be any of .*set base_model_name_or_path"):
            self.named(folder, "models/base")

    @pytest.mark.parametrize(
        ("base", "said"),
        [
            ("/no/such/folder", "is not there"),
            ("../nowhere", "is not there"),
            ("no-one/has-this", r"the base of the adapter .*set base_model_name_or_path there"),
            (None, "does not name its base model"),
            ("", "does not name its base model"),
        ],
    )
    def test_that_is_missing(self, folder, base, said):
        with pytest.raises(UserError, match=said):
            self.named(folder, base)

    def test_has_its_own_revision(self, folder):
        tuner = FineTuner(str(folder), ImportanceWeighted(), adapter="merge")
        tuner.source.revision = "of-the-adapter"  # as that of a repository: a folder has none
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "of-the-base"}))
        assert tuner.base_source.revision == "of-the-base"
        assert tuner.source.revision == "of-the-adapter"

    def test_of_an_export_is_found_from_anywhere(self, trained, rows, tmp_path, monkeypatch):
        shutil.copytree(trained["plain"][0].parent / "base", tmp_path / "base")
        monkeypatch.chdir(tmp_path)
        run("base", rows, {"lora": LoRA(rank=2)}, callbacks=[Export()], default_root_dir=tmp_path / "run")
        config = json.loads((tmp_path / "run" / "export" / CONFIG).read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")

    @pytest.mark.parametrize("own", [True, False])
    def test_gives_the_tokenizer_where_the_adapter_has_none(self, folder, own):
        if own:
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = "its own"
            tokenizer.save_pretrained(folder)
        tuner = FineTuner(str(folder), ImportanceWeighted(), adapter="continue")
        path = folder / CONFIG
        base = {"base_model_name_or_path": "../../models/base"}
        path.write_text(json.dumps(json.loads(path.read_text()) | base))
        assert (tuner.tokenizer.chat_template == "its own") is own


class TestRefusals:
    def refused(self, folder, said, **options):
        tuner = FineTuner(str(folder), ImportanceWeighted(), **options)
        with pytest.raises(UserError, match=said):
            tuner.configure_model()

    @pytest.mark.parametrize("lora", [None, LoRA()])
    def test_without_a_choice(self, trained, lora):
        folder = trained["plain"][0]
        with pytest.raises(UserError, match=r"is an adapter .*--model.adapter continue .* --model.adapter merge"):
            _ = FineTuner(str(folder), ImportanceWeighted(), lora=lora).adapter_folder  # before anything is loaded
        with pytest.raises(UserError, match="is an adapter"):
            load_model(ModelSource(str(folder)))

    @pytest.mark.parametrize("how", ["continue", "merge"])
    def test_where_there_is_none(self, trained, how):
        self.refused(
            trained["plain"][0].parent / "base", f"model.adapter is {how}, but .* is not an adapter", adapter=how
        )

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("rank", 8),
            ("alpha", 3),
            ("dropout", 0.1),
            ("target_modules", ["q_proj"]),
            ("target_modules", "all-linear"),
            ("rslora", True),
            ("dora", True),
            ("modules_to_save", ["norm"]),
            ("rank_pattern", {"q_proj": 2}),
            ("layers_to_transform", [0]),
            ("exclude_modules", ["q_proj"]),
        ],
    )
    def test_of_other_settings_than_the_adapters(self, trained, field, value):
        own = LoRA(rank=4, alpha=8, target_modules=LAYERS[::-1])
        tuner = FineTuner(str(trained["plain"][0]), ImportanceWeighted(), adapter="continue", lora=own)
        tuner.configure_model()
        assert tuner.lora.rank == 4
        self.refused(
            trained["plain"][0],
            rf"model.lora.{field} is .*the adapter",
            adapter="continue",
            lora=replace(own, **{field: value}),
        )

    def test_all_linear_is_what_it_stood_for(self, rows, tmp_path, trained):
        lora = {"lora": LoRA(rank=2)}
        run(trained["plain"][0].parent / "base", rows, lora, callbacks=[Export()], default_root_dir=tmp_path)
        tuner = FineTuner(str(tmp_path / "export"), ImportanceWeighted(), adapter="continue", **lora)
        tuner.configure_model()
        assert len(tuner.lora.target_modules) == 14

    @pytest.mark.parametrize("how", ["continue", "merge"])
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"peft_type": "LOHA"}, "is of peft_type LOHA; expected LORA"),
            ({"task_type": "SEQ_CLS"}, "is of task_type SEQ_CLS; expected CAUSAL_LM"),
            ({"bias": "all"}, "has bias 'all'"),
            ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
            ({"layer_replication": [[0, 2]]}, "has layer_replication"),
            ({"unheard_of": 3}, "has unheard_of 3"),
        ],
    )
    def test_of_what_is_not_known(self, trained, tmp_path, how, changes, said):
        shutil.copytree(trained["plain"][0], tmp_path / "adapter")
        path = tmp_path / "adapter" / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        self.refused(tmp_path / "adapter", said, adapter=how)

    def test_of_another_kind_by_peft_itself(self, tmp_path, trained):
        config = IA3Config(task_type="CAUSAL_LM", target_modules=LAYERS, feedforward_modules=["down_proj"])
        folder, _ = adapter(tmp_path / "ia3", trained["plain"][0].parent / "base", config=config)
        self.refused(folder, "is of peft_type IA3; expected LORA", adapter="merge")

    @pytest.mark.parametrize("damage", ["missing file", "missing weight", "another base", "no json", "a model, too"])
    def test_of_damaged_folders(self, trained, tmp_path, damage):
        folder = tmp_path / "adapter"
        shutil.copytree(trained["plain"][0], folder)
        path = folder / CONFIG
        config = json.loads(path.read_text())
        if damage == "missing file":
            (folder / "adapter_model.safetensors").unlink()
            said = "cannot load the weights of the adapter"
        elif damage == "missing weight":
            path.write_text(json.dumps(config | {"target_modules": [*LAYERS, "up_proj"]}))
            said = "missing .*up_proj"
        elif damage == "another base":
            tiny_model(hidden_size=48).save_pretrained(tmp_path / "wide")
            path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "wide")}))
            said = "cannot load the weights of the adapter"
        elif damage == "no json":
            path.write_text("{")
            said = f"cannot read the {CONFIG}"
        else:
            tiny_model().save_pretrained(folder)
            said = "holds both a model"
        self.refused(folder, said, adapter="continue")

    @pytest.mark.parametrize("how", ["continue", "merge"])
    @pytest.mark.parametrize(
        "options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"], "target_modules": LAYERS}]
    )
    def test_of_one_of_two_tied_weights(self, tmp_path, how, options):
        folder, _ = adapter(tmp_path / "adapter", changes={"tie_word_embeddings": True}, **options)
        self.refused(folder, "the adapter .* changes (embed_tokens|lm_head).*tie_word_embeddings", adapter=how)

    def test_of_the_adapter_off_as_the_reference(self, trained):
        with pytest.raises(UserError, match="the initial model includes the adapter"):
            FineTuner(str(trained["plain"][0]), ImportanceWeighted(), adapter="continue", reference="adapter_off")


@pytest.mark.slow
class TestCommands:
    @pytest.mark.parametrize("how", ["continue", pytest.param("merge", marks=pytest.mark.exhaustive)])
    def test_every_command_takes_it(self, trained, rows, tmp_path, monkeypatch, how, capsys):
        monkeypatch.chdir(tmp_path)
        model = ["--model.model_name", os.path.relpath(trained["plain"][0]), "--model.weighting", "DFT"]
        data = ["--data", "NuminaMathDataModule", "--data.path", str(rows), "--data.global_batch_size", "8"]
        data += ["--data.micro_batch_size", "8", "--data.max_length", "200", "--data.val_size", "4"]
        given = [*model, *data, "--trainer.accelerator", "cpu", "--run_dir", "run"]
        for command in ("fit", "diagnose", "inspect", "plan"):
            assert main([command, *given]) == 2, command
            assert "is an adapter" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        given += ["--model.adapter", how]
        assert main(["fit", *given, "--trainer.max_steps", "1", "--model.optimizer.lr", "0.01"]) == 0
        assert main(["diagnose", *given, "--output", "page.html"]) == 0
        assert main(["inspect", *given, "--rows", "0"]) == 0
        assert main(["plan", *given]) == 0
        for command in ("validate", "predict"):
            assert main([command, *given]) == 0
            assert main([command, *given, "--ckpt_path", "last"]) == 0
        assert main(["fit", *given, "--trainer.max_steps", "2"]) == 0


class TestOfTheHub:
    @pytest.fixture
    def hub(self, trained, tmp_path, monkeypatch):
        """A cache with an adapter and, at another revision than the newest, its base."""
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for name, revision, source in (
            ("adapter", "main", trained["plain"][0]),
            ("base", "old", trained["plain"][0].parent / "base"),
        ):
            place = tmp_path / f"models--someone--{name}"
            shutil.copytree(source, place / "snapshots" / ("0" * 40))
            (place / "refs").mkdir()
            (place / "refs" / revision).write_text("0" * 40)
        path = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40) / CONFIG
        named = {"base_model_name_or_path": "someone/base", "revision": "old"}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))

    @pytest.mark.parametrize("how", ["continue", "merge"])
    def test_a_repository_is_an_adapter_as_well(self, hub, trained, how):
        tuner = FineTuner("someone/adapter", ImportanceWeighted(), adapter=how)
        tuner.configure_model()
        truth = trained["plain"][1]
        torch.testing.assert_close(logits(tuner.model), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
        assert tuner.tokenizer.eos_token == "<|im_end|>"
        if how == "continue":
            config = tuner.model.peft_config["default"]
            assert (config.base_model_name_or_path, config.revision) == ("someone/base", "old")

    def test_and_wants_a_choice(self, hub):
        with pytest.raises(UserError, match=r"'someone/adapter' is an adapter"):
            FineTuner("someone/adapter", ImportanceWeighted()).configure_model()
