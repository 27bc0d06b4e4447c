"""What adapters compute, and that they begin as the model that they adapt."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from harness import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dft_lightning import FineTuner
from dft_lightning.adapters import LoRA, add_lora, begin_at_the_model, prepare_adapters
from dft_lightning.errors import UserError
from dft_lightning.resume import identity_by_options
from dft_lightning.weighting import ImportanceWeighted

KINDS = {
    "plain": LoRA(rank=4),
    "rslora": LoRA(rank=4, rslora=True),
    "dora": LoRA(rank=4, dora=True),
    "both": LoRA(rank=4, rslora=True, dora=True, dropout=0.3),
}
ids = torch.arange(40)[None]


def learnt(model):
    """Adapters with an update, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1.5
    return model


def on_and_off(model, casting=nullcontext):
    model.eval()
    with torch.no_grad(), casting():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            return adapted, model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["float32", "float64", "bfloat16", "float16", "all bfloat16", "autocast"])
def test_an_adapter_begins_as_its_model_to_the_bit(kind, how):
    """Also where it is held more precisely than the model: peft would begin a tenth of a logit away there."""
    dtype = {"autocast": torch.float32, "all bfloat16": torch.bfloat16}.get(how) or getattr(torch, how)
    model = add_lora(tiny_model(dtype=dtype), KINDS[kind])
    if how == "all bfloat16":
        model = model.bfloat16()
        begin_at_the_model(model)
    casting = (lambda: torch.autocast("cpu", torch.bfloat16)) if how == "autocast" else nullcontext
    adapted, plain = on_and_off(model, casting)
    assert torch.equal(adapted, plain)
    adapted, plain = on_and_off(learnt(model), casting)
    assert not torch.equal(adapted, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas(kind):
    """W + s·BA with s = α/r, or α/√r; with magnitudes m, its rows at length m. In float64, to some roundings."""
    lora = KINDS[kind]
    layer = learnt(add_lora(tiny_model(dtype=torch.float64), lora)).eval().get_base_model().model.layers[0].mlp.up_proj
    a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    scale = 16 / 2 if lora.rslora else 16 / 4
    expected = weight + scale * b @ a
    if lora.dora:
        magnitude = 1.5 * weight.norm(dim=1)
        expected = expected / expected.norm(dim=1, keepdim=True) * magnitude[:, None]
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-12, atol=1e-12)


class Watched(FineTuner):
    """Keeps the weights of its training tokens."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), self.trained_on.weight]
        return loss


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize("precision", [{}, {"precision": "bf16-true"}, {"precision": "bf16-mixed"}])
def test_importance_weights_of_a_run_begin_at_one(model_dir, rows_file, kind, precision):
    """The first step's tokens weigh exactly 1, as under the reference; later ones do not."""
    module = {"lora": KINDS[kind], "optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "warmup_ratio": 0.0}
    tuner = fit(model_dir, rows_file, ImportanceWeighted(), module=module, kind=Watched, max_steps=2, **precision)[0]
    assert torch.equal(tuner.seen[0], torch.ones_like(tuner.seen[0]))
    assert not torch.equal(tuner.seen[1], torch.ones_like(tuner.seen[1]))


def test_a_half_precise_model_begins_as_itself_in_a_run(model_dir, rows_file):
    """Weights in bfloat16, adapters in float32."""
    module = {"lora": KINDS["dora"], "dtype": "bfloat16"}
    tuner = fit(model_dir, rows_file, ImportanceWeighted(), module=module, kind=Watched, max_steps=1)[0]
    assert torch.equal(tuner.seen[0], torch.ones_like(tuner.seen[0]))


def test_another_device_adds_up_in_another_order(model_dir, rows_file):
    """What a GPU finds for the rows' lengths is some roundings from what the CPU had found."""

    class Elsewhere(Watched):
        def configure_model(self):
            super().configure_model()
            for name, parameter in self.network.named_parameters():
                if "magnitude" in name:
                    parameter.data *= 1 + 2**-20

    module = {"lora": KINDS["dora"]}
    tuner = fit(model_dir, rows_file, ImportanceWeighted(), module=module, kind=Elsewhere, max_steps=1)[0]
    assert torch.equal(tuner.seen[0], torch.ones_like(tuner.seen[0]))


def test_sharded_magnitudes_are_refused():
    """Their rows are gathered in another precision than they are held in."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for kind, refused in (("plain", nullcontext()), ("dora", pytest.raises(UserError, match=r"dora is true.*ddp"))):
            model = add_lora(tiny_model(), KINDS[kind])
            for layer in model.get_decoder().layers:
                fully_shard(layer, mesh=mesh)
            with refused:
                prepare_adapters(model, initial=True)
    finally:
        dist.destroy_process_group()


def test_what_dora_has_learnt_outlives_a_restart(model_dir, rows_file, tmp_path):
    """Magnitudes are set at the beginning of a run only."""
    module = {"lora": KINDS["dora"], "lr_schedule": "constant", "warmup_ratio": 0.0}
    module |= {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    options = {"module": module, "default_root_dir": tmp_path, "enable_checkpointing": True}
    whole = fit(model_dir, rows_file, **options)[0]
    keep = ModelCheckpoint(tmp_path, "kept", every_n_train_steps=2)
    fit(model_dir, rows_file, max_steps=2, callbacks=[keep], **options)
    rest = fit(model_dir, rows_file, ckpt_path=str(tmp_path / "kept.ckpt"), **options)[0]
    start = rest.initial_model().state_dict()
    for (name, ours), truth in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, truth), name
        assert "q_proj.lora_magnitude" not in name or not torch.equal(ours, start[name])


def test_checkpoints_from_before_these_switches_go_on():
    """They do not name them; that is the same run as one with both off, and another than one with either on."""
    hparams = {"model_name": "m", "weighting": {}, "normalize": "tokens", "tokenizer_name": None, "chat_template": None}
    old = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
    then = identity_by_options(hparams | {"lora": old})
    assert identity_by_options(hparams | {"lora": old | {"rslora": False, "dora": False}}) == then
    assert identity_by_options(hparams | {"lora": old | {"rslora": True, "dora": False}}) != then
    assert identity_by_options(hparams | {"lora": None}) != then
