"""Tokens that were added to the tokenizer get rows of the embedding and the head: trained, resumed, exported."""

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from ranks import start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.embedding_rows import grow, rows_needed
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, ImportanceWeighted

OLD, NEW = 289, 291
ADDED = ["<think>", "</think>"]
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "warmup_ratio": 0.0, "lr_schedule": "constant"}
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "soft-cap": {"family": "gemma2"},
    "bias of the head": {"family": "phi"},
}


def saved(folder, **options):
    """A model whose tokenizer has two tokens more than its embedding has rows."""
    tiny_model(**({"vocab_size": OLD} | options)).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    assert tokenizer.add_tokens(ADDED) == len(ADDED)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """Rows whose answers begin with the added tokens."""
    found = sums(24)
    for row in found:
        row["solution"] = f"<think> add </think> {row['solution']}"
    return write_jsonl(tmp_path / "thinking.jsonl", found)


def table(model):
    """(V, H) of the embedding, and of the head."""
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@torch.no_grad()
def logits(model, end=NEW):
    return model.eval()(input_ids=torch.arange(250, end)[None]).logits


class TestGrowing:
    @pytest.mark.parametrize("name", MODELS)
    def test_old_rows_stay_and_new_ones_are_near_the_mean(self, tmp_path, name):
        folder = saved(tmp_path, **MODELS[name])
        before = load_model(ModelSource(str(folder)))
        after = load_model(ModelSource(str(folder), embedding_rows=NEW))
        for old, new in zip(table(before), table(after), strict=True):
            assert new.shape[0] == NEW
            assert torch.equal(new[:OLD], old)
            # transformers draws them with 1e-9 of the old rows' covariance
            apart = (new[OLD:] - old.mean(0)).norm(dim=1)
            assert bool((apart < 1e-3 * old.norm(dim=1).mean()).all())
        assert after.config.vocab_size == NEW
        torch.testing.assert_close(logits(before, OLD), logits(after, OLD)[..., :OLD], rtol=1e-5, atol=1e-6)
        tied = MODELS[name].get("tie_word_embeddings", name == "soft-cap")
        assert (after.get_input_embeddings().weight is after.get_output_embeddings().weight) == tied

    def test_by_the_seed_alone(self, tmp_path):
        folder, found = saved(tmp_path), []
        for seed, drawn in ((1, 0), (1, 5), (2, 0)):
            torch.manual_seed(drawn)
            state = torch.get_rng_state()
            found.append(table(load_model(ModelSource(str(folder), embedding_rows=NEW, seed=seed))))
            assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one, two) for one, two in zip(found[0], found[1], strict=True))
        assert not torch.equal(found[0][0], found[2][0])

    def test_the_shape_alone_is_that_of_the_model(self, tmp_path):
        source = ModelSource(str(saved(tmp_path, family="phi")), embedding_rows=NEW)
        with torch.device("meta"):
            empty = load_model(source, empty=True)
        shapes = [{n: w.shape for n, w in model.state_dict().items()} for model in (empty, load_model(source))]
        assert shapes[0] == shapes[1]

    def test_it_never_shrinks(self, tmp_path):
        model = load_model(ModelSource(str(saved(tmp_path, vocab_size=400)), embedding_rows=NEW))
        assert len(table(model)[0]) == model.config.vocab_size == 400
        grow(model, None, 0)
        assert len(table(model)[0]) == 400

    @pytest.mark.parametrize(
        ("resize", "rows"), [(False, None), (True, NEW), (1, NEW), (64, 320), (97, NEW), (NEW, NEW)]
    )
    def test_how_many(self, tmp_path, resize, rows):
        assert rows_needed(AutoTokenizer.from_pretrained(saved(tmp_path)), resize) == rows


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"resize_embeddings": 0}, "resize_embeddings is 0; expected true, false, or a multiple"),
        ({"resize_embeddings": -8}, "resize_embeddings is -8"),
        ({"resize_embeddings": True, "quantization": "nf4", "lora": LoRA()}, "quantization nf4 holds adapters alone"),
        ({"resize_embeddings": True, "reference": "adapter_off", "lora": LoRA()}, "use 'cache' or 'copy'"),
        ({"revision": "main"}, "revision is 'main'.*has no revisions: leave it out"),
    ],
)
def test_what_does_not_go_with_it(tmp_path, options, pattern):
    from dft_lightning import FineTuner

    with pytest.raises(UserError, match=pattern):
        FineTuner(str(tmp_path), DFT(), **options)


def kinds():
    for lora in (None, LoRA(rank=2)):
        for name in MODELS if lora is None else ("untied", "tied"):
            yield pytest.param(name, lora, id=f"{name}{', LoRA' if lora else ''}")


@pytest.mark.parametrize(("name", "lora"), kinds())
def test_following_the_advice_trains_resumes_and_exports(tmp_path, rows, name, lora):
    model = saved(tmp_path / "model", **MODELS[name])
    with pytest.raises(UserError, match=r"token id 290 \('</think>'\).*--model.resize_embeddings true"):
        fit(model, rows, module={"lora": lora})
    own = FAST | {"resize_embeddings": True, "lora": lora}
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path / "run"}
    whole = fit(model, rows, module=own, max_steps=3)[0]
    fit(model, rows, module=own, max_steps=2, callbacks=[Checkpoints()], **saving)
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="resize_embeddings"):
        fit(model, rows, module=own | {"resize_embeddings": False}, ckpt_path=last, max_steps=3, **saving)
    callbacks = [Checkpoints(), Export(merge_lora=lora is not None)]
    ours = fit(model, rows, module=own, max_steps=3, ckpt_path=last, callbacks=callbacks, **saving)[0]
    for one, two in zip(whole.model.state_dict().values(), ours.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    start_rows = table(load_model(ModelSource(str(model), embedding_rows=NEW)))
    for begun, trained in zip(start_rows, table(ours.model), strict=True):
        assert bool((begun[OLD:] != trained[OLD:]).any(dim=1).all())  # each of the new rows is trained
    assert main(["export", last, str(tmp_path / "out")]) == 0
    for folder in (tmp_path / "run" / "export", tmp_path / "out"):
        assert torch.equal(logits(loaded(folder, model if lora else None)), logits(ours.model))
        assert len(AutoTokenizer.from_pretrained(folder)) == NEW
    if lora is not None:
        merged = loaded(tmp_path / "run" / "export-merged")
        assert merged.config.vocab_size == NEW
        torch.testing.assert_close(logits(merged), logits(ours.model), rtol=1e-4, atol=1e-5)


def loaded(folder, base=None):
    """As its user loads it: an adapter onto the base model with as many rows as it has."""
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(NEW)
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("reference", ["auto", "copy"])
def test_the_reference_next_to_an_adapter_is_the_initial_model(tmp_path, rows, reference):
    """With the adapter off, the trained embedding would be part of it: at the start every weight is 1, later not."""
    model = saved(tmp_path / "model")
    own = {"resize_embeddings": True, "lora": LoRA(rank=2), "reference": reference}
    found = fit(model, rows, ImportanceWeighted(), module=FAST | own, max_steps=3)
    assert found[0].reference_in_force == ("cache" if reference == "auto" else "copy")
    weights = [step["train/weight_mean"] for step in found[1].logged]
    assert weights[0] == pytest.approx(1.0, abs=1e-5)
    assert weights[-1] != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("lora", [[], ["--model.lora.rank", "2"]], ids=["full", "LoRA"])
def test_a_plan_has_the_new_rows_and_trains_them(tmp_path, rows, lora, capsys, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "model")
    given = ["plan", "--model.model_name", str(model), "--model.weighting", "DFT", "--data", "NuminaMathDataModule"]
    given += ["--data.path", str(rows), "--device", "cpu", "--trainer.accelerator", "cpu", "--json", *lora]
    assert main([*given, "--model.resize_embeddings", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    options = {"lora": LoRA(rank=2) if lora else None, "resize_embeddings": 64}
    trained = fit(model, rows, module=options, max_steps=1)[0].model
    assert plan["parameters"] == sum(weight.numel() for weight in trained.parameters())
    assert plan["trained_parameters"] == sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)


@pytest.mark.slow
def test_two_ranks_that_shard_the_model(tmp_path):
    """One rank reads and draws for all: weights that the checkpoint lacks, and rows that it does not have."""
    folder = saved(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(tmp_path / "rows.jsonl", sums(12))
    start(2, __file__, "sharded", tmp_path)


def sharded(folder):
    given = {"devices": 2, "strategy": "fsdp2", "recorder": False, "max_steps": 1}
    own = {"resize_embeddings": True, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "lora": LoRA(rank=2)}
    with pytest.raises(UserError, match=r"1 missing from it: model\.norm\.weight"):
        fit(folder / "model", folder / "rows.jsonl", module=own, **given)
    own["allow_missing"] = ["model.norm.weight"]
    export = {"callbacks": [Checkpoints(), Export()], "default_root_dir": folder / "run", "enable_checkpointing": True}
    found = fit(folder / "model", folder / "rows.jsonl", module=own, **given, **export)[0]
    source = ModelSource(str(folder / "model"), allow_missing=own["allow_missing"], embedding_rows=NEW)
    alone = dict(load_model(source).named_parameters())
    for name, weight in found.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight.full_tensor(), alone[name.replace(".base_layer.", ".")]), name
    adapter = load_file(folder / "run" / "export" / "adapter_model.safetensors")
    assert [len(weight) for name, weight in adapter.items() if "lora_" not in name] == [NEW, NEW]
