"""Weights that a checkpoint lacks, or that a model has no place for: refused by name, or as `allow_missing` says."""

import json
import re
import shutil

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from safetensors.torch import load_file, save_file
from test_row_limits import config
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.checkpoint_keys import Differences, abbreviated
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model

NAN, INF = float("nan"), float("inf")


def saved(folder, change=None, **options):
    """A tiny model whose weights are changed by name in its file."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if change is not None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": weight for name, weight in state.items()}


def without(pattern):
    return lambda state: {name: weight for name, weight in state.items() if not re.search(pattern, name)}


def with_(**weights):
    return lambda state: state | {name.replace("__", "."): weight for name, weight in weights.items()}


def filled(value):
    def change(state):
        state["model.layers.1.mlp.up_proj.weight"][3, 2] = value
        return state

    return change


REFUSED = {
    "compiled": (prefixed("_orig_mod."), r"21 missing from it: lm_head.weight.*21 in it.*begin with '_orig_mod\.'"),
    "wrapped": (prefixed("module."), r"begin with 'module\.'"),
    "of peft": (prefixed("base_model.model."), r"begin with 'base_model\.model\.'"),
    "a layer is missing": (without(r"layers\.1\."), r"9 missing from it: model\.layers\.1\.input_layernorm\.weight.*"),
    "no head": (without("lm_head"), r"1 missing from it: lm_head\.weight.*set tie_word_embeddings true"),
    "no norm": (without(r"^model\.norm"), r"1 missing from it: model\.norm\.weight"),
    "another shape": (with_(model__norm__weight=torch.ones(33)), r"model\.norm\.weight \(33,\), not \(32,\)"),
    "more layers": (
        lambda state: state | {name.replace("s.1.", "s.2."): weight.clone() for name, weight in state.items()},
        r"9 in it that the model does not use: model\.layers\.2\.",
    ),
    "another part": (with_(vision__proj__weight=torch.ones(2, 2)), r"1 in it .*: vision\.proj\.weight"),
    "not a number": (filled(NAN), r"NaN or infinite values in 1 weights: model\.layers\.1\.mlp\.up_proj\.weight"),
    "infinite": (filled(-INF), r"NaN or infinite values in 1 weights: model\.layers\.1\.mlp\.up_proj\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_refused_by_name(tmp_path, name):
    change, pattern = REFUSED[name]
    with pytest.raises(UserError, match=pattern):
        load_model(ModelSource(str(saved(tmp_path, change))))


@pytest.mark.parametrize("name", ["a layer is missing", "no head", "another shape", "more layers", "compiled"])
def test_the_advice_is_taken(tmp_path, name):
    """What the message says to set is accepted, whatever the difference is."""
    folder = str(saved(tmp_path, REFUSED[name][0]))
    with pytest.raises(UserError) as refused:
        load_model(ModelSource(folder))
    advised = re.search(r"--model.allow_missing '(.*)'$", str(refused.value))[1]
    load_model(ModelSource(folder, allow_missing=json.loads(advised)))


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"family": "gemma2"}, {"family": "phi"}, {}])
def test_what_is_whole_is_loaded_without_a_word(tmp_path, options, caplog):
    folder = saved(tmp_path, **options)
    loaded, truth = load_model(ModelSource(str(folder))), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(weight, truth.get_parameter(name)) for name, weight in loaded.named_parameters())
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_weights_are_no_infinite_ones(tmp_path, dtype):
    """Their sum overflows."""
    huge = float(torch.finfo(dtype).max)
    folder = saved(tmp_path, with_(model__norm__weight=torch.full((32,), huge, dtype=dtype)))
    assert load_model(ModelSource(str(folder), dtype)).model.norm.weight[0].item() == huge


def test_buffers_that_are_computed_are_no_weights(tmp_path):
    """Files of earlier versions have rotary frequencies."""
    extra = {f"model.{name}.inv_freq": torch.ones(4) for name in ("rotary_emb", "layers.0.self_attn.rotary_emb")}
    load_model(ModelSource(str(saved(tmp_path, lambda state: state | extra))))


@pytest.mark.parametrize("family", ["GPT2", "GPTNeo", "GPTJ", "GPTBigCode"])
def test_causal_masks_of_earlier_versions_are_no_weights(tmp_path, family):
    """A bias of a linear layer is one."""
    model = AutoModelForCausalLM.from_config(config(family))
    ending = "attn.attention" if family == "GPTNeo" else "attn"
    attention = next(name for name, _ in model.named_modules() if name.endswith(ending))
    state = model.state_dict() | {f"{attention}.bias": torch.ones(1, 1, 8, 8).bool()}
    state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
    config(family).save_pretrained(tmp_path)
    for name in [name for name in state if name == "lm_head.weight"]:
        state[name] = state[name].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelSource(str(tmp_path)))
    linear = next(
        name for name, layer in model.named_modules() if name.startswith(attention) and not [*layer.children()]
    )
    save_file(
        state | {f"{linear}.masked_bias": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"1 in it that the model does not use: .*\.masked_bias"):
        load_model(ModelSource(str(tmp_path)))


class TestAllowed:
    def test_it_is_initialised_from_the_seed_alone(self, tmp_path, caplog):
        folder = str(saved(tmp_path, without("lm_head|layers.1.mlp")))
        heads = []
        for seed, drawn in ((3, 0), (3, 1), (4, 0)):
            torch.manual_seed(drawn)
            state = torch.get_rng_state()
            source = ModelSource(folder, allow_missing=["lm_head.weight", "model.layers.*.mlp.*"], seed=seed)
            heads.append(load_model(source).lm_head.weight)
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(heads[0], heads[1])
        assert not torch.equal(heads[0], heads[2])
        assert float(heads[0].detach().std()) == pytest.approx(0.2, rel=0.05)  # config.initializer_range

    def test_it_is_printed(self, tmp_path, caplog):
        folder = str(saved(tmp_path, lambda state: without("lm_head")(state) | {"extra.weight": torch.ones(2)}))
        with caplog.at_level("INFO"):
            load_model(ModelSource(folder, allow_missing=["lm_head.*", "extra.weight"], seed=7))
        assert "1 weights are not in the checkpoint" in caplog.text
        assert "initialised from seed 7: lm_head.weight" in caplog.text
        assert "are left out: extra.weight" in caplog.text

    @pytest.mark.parametrize("names", [["lm_head.weight"], ["lm_head.*", "nonsense"]])
    def test_what_is_not_missing_is_refused(self, tmp_path, names):
        folder = saved(tmp_path, None if len(names) == 1 else without("lm_head"))
        with pytest.raises(UserError, match=rf"allow_missing names \['{re.escape(names[-1])}'\].*leave that out"):
            load_model(ModelSource(str(folder), allow_missing=names))

    def test_other_names_are_still_refused(self, tmp_path):
        folder = saved(tmp_path, without("lm_head|^model.norm"))
        with pytest.raises(UserError, match=r"1 missing from it: model\.norm\.weight"):
            load_model(ModelSource(str(folder), allow_missing=["lm_head.weight"]))

    def test_a_run_trains_resumes_and_exports_it(self, tmp_path, rows_file):
        """A frozen copy of the initial model begins with the same weights, or the reference would have changed."""
        model = saved(tmp_path / "model", without("lm_head"))
        own = {"allow_missing": ["lm_head.weight"]}
        saving = {"enable_checkpointing": True, "default_root_dir": tmp_path / "run"}
        first = fit(model, rows_file, module=own, callbacks=[Checkpoints()], max_steps=2, **saving)[0]
        last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
        callbacks = [Checkpoints(), Export()]
        ours = fit(model, rows_file, module=own, callbacks=callbacks, ckpt_path=last, max_steps=3, **saving)[0]
        exported = load_model(ModelSource(str(tmp_path / "run" / "export")))
        assert torch.equal(exported.lm_head.weight, ours.model.lm_head.weight)
        assert not torch.equal(first.model.lm_head.weight, ours.model.lm_head.weight)


class TestTies:
    def test_two_that_differ_are_refused(self, tmp_path):
        folder = saved(tmp_path, with_(lm_head__weight=torch.ones(320, 32)), tie_word_embeddings=True)
        with pytest.raises(UserError, match=r"has both of lm_head.weight and model.embed_tokens.weight.*set tie_word"):
            load_model(ModelSource(str(folder)))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        assert bool((load_model(ModelSource(str(folder))).lm_head.weight == 1).all())

    def test_two_that_are_equal_are_one(self, tmp_path):
        folder = saved(
            tmp_path, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True
        )
        model = load_model(ModelSource(str(folder)))
        assert model.lm_head.weight is model.model.embed_tokens.weight


DAMAGED = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(tmp_path, damage):
    file = saved(tmp_path) / "model.safetensors"
    DAMAGED[damage](file)
    with pytest.raises(UserError, match="cannot load the weights of model"):
        load_model(ModelSource(str(tmp_path)))


def test_a_shard_that_is_gone(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(UserError, match="cannot load the weights of model"):
        load_model(ModelSource(str(tmp_path)))


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    saved(folder / "model", without(r"layers\.1\.mlp\.up"))
    write_jsonl(folder / "rows.jsonl", sums(12))
    return folder


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "diagnose", "inspect"])
def test_every_command_refuses(bad, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = str(bad / "rows.jsonl")
    weighting = [] if command in ("diagnose", "inspect") else ["--model.weighting", "DFT"]
    given = ["--model.model_name", str(bad / "model"), *weighting, "--data", "ChatDataModule", "--data.path", rows]
    given += ["--data.val_path", rows, "--data.test_path", rows, "--trainer.accelerator", "cpu"]
    assert main([command, *given]) == 2
    assert "1 missing from it: model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4"])
def test_in_four_bits(tmp_path, quantization):
    """The layers that are quantized while they are read, and those that are not."""
    big = {"hidden_size": 64, "intermediate_size": 64}
    for pattern in (r"layers\.1\.mlp\.up", "lm_head"):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = saved(tmp_path / "model", without(pattern), **big)
        with pytest.raises(UserError, match="1 missing from it"):
            load_model(ModelSource(str(folder), quantization=quantization))
    whole = saved(tmp_path / "whole", **big)
    load_model(ModelSource(str(whole), quantization=quantization))


def test_names_are_abbreviated():
    names = {f"model.layers.{layer}.mlp.{part}.weight" for layer in range(61) for part in ("up", "down")}
    text = "model.layers.{0–60}.mlp.down.weight (61), model.layers.{0–60}.mlp.up.weight (61)"
    assert abbreviated(names) == text
    assert abbreviated(f"{letter}.weight" for letter in "abcdefghij").endswith("h.weight, and 2 more kinds")


def test_patterns_leave_nothing_out():
    found = Differences(frozenset({"a.0.w", "a.1.w"}), frozenset({"b.w"}), {"c.w": ((1,), (2,))})
    assert not found.without(["a.*", "b.w", "c.?"]).names
    assert found.without(["a.0.*"]).names == {"a.1.w", "b.w", "c.w"}
