"""What is frozen by patterns of names does not change, and everything else does."""

from functools import partial

import pytest
import torch
from conftest import tiny_config, tiny_model, tiny_tokenizer
from resuming import last, resumes_to_the_bit, run

from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.errors import UserError
from dft_lightning.freezing import Freezing, freezing_of
from dft_lightning.models import LoRA, add_lora
from dft_lightning.planning.memory import memory
from dft_lightning.planning.rehearsal import MicroBatch

ADAM = {"optimizer": partial(torch.optim.AdamW, lr=0.01)}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"freeze": ["model.layers.0.*"]}, lambda name: "layers.0." in name),
        ({"freeze": ["*norm*", "lm_head.weight"]}, lambda name: "norm" in name or "lm_head" in name),
        ({"train_only": ["model.layers.[01].mlp.*"]}, lambda name: ".mlp." not in name),
        ({"train_only": ["*.mlp.*"], "freeze": ["*.up_proj.*"]}, lambda name: ".mlp." not in name or "up_proj" in name),
    ],
    ids=["layers", "names", "train_only", "both"],
)
def test_frozen_parameters_stay_and_others_move(model_dir, rows_file, tmp_path, options, frozen):
    tuner, trainer = resumes_to_the_bit(model_dir, rows_file, tmp_path, ADAM | options)
    initial = tiny_model().state_dict()
    for name, value in tuner.network.model.state_dict().items():
        assert torch.equal(value, initial[name]) == frozen(name), name
    counted = sum(value.numel() for name, value in initial.items() if frozen(name))
    assert run_facts(trainer, tuner)["frozen"].startswith(f"{counted:,} parameters in ")
    optimized = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in tuner.network.parameters() if p.requires_grad}
    assert all(p.grad is None for p in tuner.network.parameters() if not p.requires_grad)


def test_tied_weights_go_by_either_name(rows_file, tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    tuner, _, trainer = run(tmp_path / "tied", rows_file, tmp_path / "run", ADAM | {"freeze": ["lm_head.*"]})
    assert not tuner.network.model.model.embed_tokens.weight.requires_grad
    assert "tied: model.embed_tokens.weight" in run_facts(trainer, tuner)["frozen"]
    assert trained(Freezing(train_only=("lm_head.weight",)).apply(tiny_model(tie_word_embeddings=True))) == {
        "model.embed_tokens.weight"
    }


def test_adapters_of_some_layers():
    model = Freezing(freeze=("model.layers.0.*",)).apply(add_lora(tiny_model(), LoRA(rank=2)))
    assert trained(model)
    assert all("layers.1." in name and "lora_" in name for name in trained(model))
    model = Freezing(train_only=("*.layers.0.*lora_B*",)).apply(add_lora(tiny_model(), LoRA(rank=2)))
    assert all("layers.0." in name and "lora_B" in name for name in trained(model))
    with pytest.raises(UserError, match=r"model.train_only 'lm_head\.\*' matches no trainable parameter"):
        Freezing(train_only=("lm_head.*",)).apply(add_lora(tiny_model(), LoRA(rank=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["model.layer.*"]}, r"model.freeze 'model.layer.\*' matches no parameter of the model"),
        ({"freeze": ["model.layers.0"]}, r"did you mean 'model.layers.0.\*'"),
        ({"freeze": ["*.mlp.*", "nothing"]}, "model.freeze 'nothing' matches no parameter"),
        ({"train_only": ["nothing"]}, "model.train_only 'nothing' matches no trainable parameter"),
        ({"freeze": ["*"]}, "leave no parameter to train"),
        ({"freeze": ["*.mlp.*"], "train_only": ["*.mlp.*"]}, "leave no parameter to train"),
    ],
    ids=str,
)
def test_a_pattern_for_nothing_and_nothing_to_train_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        freezing_of(options.get("freeze"), options.get("train_only")).apply(tiny_model())


def test_one_pattern_is_no_list():
    with pytest.raises(UserError, match=r"model.freeze is '\*.mlp.\*'; expected a list"):
        freezing_of("*.mlp.*", None)


def test_another_choice_is_refused_after_a_checkpoint(model_dir, rows_file, tmp_path):
    run(model_dir, rows_file, tmp_path, ADAM | {"freeze": ["model.layers.0.*"]})
    with pytest.raises(UserError, match=r"parameters \(freeze\).*its state does not fit"):
        run(model_dir, rows_file, tmp_path, ADAM | {"freeze": ["model.layers.1.*"]}, ckpt_path=last(tmp_path))


def test_a_frozen_head_takes_no_gradient_and_no_states():
    from dft_lightning.planning.memory import Load

    def need(**options):
        given = {"lora": None, "dtype": torch.float32, "precision": "32-true", "attention": None, "accumulates": True}
        place = {"ranks": 1, "cuda": False, "capacity": 2**40, "chunk_rows": 16}
        shape = MicroBatch.full(2, 16)
        make = options.pop("optimizer", ADAM["optimizer"])
        return memory(Load(tiny_config(), optimizer=make, shape=shape, **given, **place, **options), "none")

    plain, frozen = need(), need(freezing=Freezing(freeze=("lm_head.weight",)))
    head = 320 * 32 * 4
    assert plain.gradients - frozen.gradients == head
    assert plain.held["optimizer states"] - frozen.held["optimizer states"] == pytest.approx(2 * head, rel=1e-3)
    assert plain.micro_batch.head - frozen.micro_batch.head >= head
    matrices = sum(p.numel() * 4 for name, p in tiny_model().named_parameters() if "_proj" in name)
    muon = need(optimizer=partial(torch.optim.Muon, lr=0.1)).held["optimizer states"]
    assert plain.held["optimizer states"] - muon == pytest.approx(matrices, rel=1e-3)
