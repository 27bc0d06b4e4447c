"""Which precision each trained tensor has, by the options of model, LoRA and trainer; and what is refused by name."""

import itertools

import pytest
import torch
from harness import fit
from quantized import needs_bitsandbytes, saved
from torch import nn

from dft_lightning import FineTuner
from dft_lightning.__main__ import main
from dft_lightning.adapter_names import of_adapter
from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.callbacks import Checkpoints, RunSummary
from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.precision import refuse_precision
from dft_lightning.weighting import DFT, ImportanceWeighted

#: With an eps that float16 does not round to zero.
ADAMW = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4), "warmup_ratio": 0.0}
EXHAUSTIVE = pytest.mark.exhaustive
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")
HELD = {"64-true": "float64", "bf16-true": "bfloat16", "16-true": "float16"}
ADAPTERS = {
    "all weights": None,
    "LoRA": LoRA(rank=2),
    "LoRA in bfloat16": LoRA(rank=2, dtype="bfloat16"),
    "LoRA in float64": LoRA(rank=2, dtype="float64"),
    "full copies": LoRA(rank=2, modules_to_save=["embed_tokens", "norm", "lm_head"]),
    "DoRA": LoRA(rank=2, dora=True),
}


def expected(dtype, precision, adapters):
    """(that of the weights, that of what is trained); the option that is refused in place of it."""
    lora, true = ADAPTERS[adapters], HELD.get(precision)
    if true and dtype not in ("auto", true):
        return f"model.dtype is {dtype}, but trainer.precision {precision}"
    weights = true or ("float32" if dtype == "auto" else dtype)
    wide = "float64" if weights == "float64" else "float32"
    trained = weights if lora is None else wide if lora.dtype == "auto" else lora.dtype
    if "mixed" in precision and dtype == "float64":
        return f"model.dtype is float64, .*trainer.precision {precision}"
    if "mixed" in precision and lora is not None and lora.dtype == "float64":
        return f"model.lora.dtype is float64, .*trainer.precision {precision}"
    if precision == "16-mixed" and trained != "float32":
        return rf"model\.(lora\.)?dtype is {trained}, but trainer.precision 16-mixed"
    return weights, trained


EVERY = [*itertools.product(DTYPES, PRECISIONS, ADAPTERS)]
TRAINABLE = [case for case in EVERY if isinstance(expected(*case), tuple) and case[1] != "16-mixed"]
#: Each precision by itself, each pair of different ones, and each kind of adapter at half precision.
COVERING = {(d, p, a) for d, p, a in TRAINABLE if a in ("all weights", "LoRA") and (d == "auto" or p == "32-true")}
COVERING |= {("auto", "bf16-true", name) for name in ADAPTERS} | {("bfloat16", "bf16-mixed", "full copies")}


def marked(case):
    return pytest.param(*case, marks=() if case in COVERING else pytest.mark.exhaustive)


@pytest.mark.parametrize(("dtype", "precision", "adapters"), map(marked, TRAINABLE))
def test_what_is_said_is_what_the_tensors_are(model_dir, rows_file, dtype, precision, adapters):
    """Parameters, gradients, optimizer states the summary; and each tensor that is trained in float32 has moved."""
    lora, facts = ADAPTERS[adapters], {}

    class Keep(RunSummary):
        def on_train_start(self, trainer, pl_module):
            facts.update(run_facts(trainer, pl_module))
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    keep = Keep()
    module = ADAMW | {"lora": lora, "dtype": dtype}
    tuner, _, trainer = fit(model_dir, rows_file, module=module, precision=precision, callbacks=[keep], max_steps=2)
    weights, trained = (getattr(torch, name) for name in expected(dtype, precision, adapters))
    parameters = dict(tuner.network.model.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.dtype == (trained if lora is None or of_adapter(name) else weights), name
        assert parameter.requires_grad == (lora is None or of_adapter(name)), name
    optimizer = trainer.optimizers[0]
    for parameter, state in optimizer.state.items():
        assert {value.dtype for key, value in state.items() if key != "step"} == {trained}
        assert parameter.grad is None or parameter.grad.dtype == trained
    assert len(optimizer.state) == sum(parameter.requires_grad for parameter in parameters.values())
    said = f"{precision}, weights in {str(weights).removeprefix('torch.')}"
    said += "" if lora is None else f", adapters in {str(trained).removeprefix('torch.')}"
    assert facts["precision"] == said
    for name, parameter in tuner.named_parameters():
        if parameter.requires_grad and trained.itemsize >= 4:
            assert not torch.equal(parameter, keep.before[name]), name


@pytest.mark.parametrize(("dtype", "precision", "adapters"), EVERY)
def test_what_contradicts_itself_is_refused(dtype, precision, adapters):
    tuner = FineTuner("nowhere", DFT(), dtype=dtype, lora=ADAPTERS[adapters])
    found = expected(dtype, precision, adapters)
    if isinstance(found, tuple):
        refuse_precision(tuner, precision)
    else:
        with pytest.raises(UserError, match=found):
            refuse_precision(tuner, precision)


@pytest.mark.parametrize("precision", ["transformer-engine", "transformer-engine-float16", "16-mixed", "bf16-true"])
def test_before_anything_is_read_or_written(tmp_path, rows_file, precision, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "NuminaMathDataModule", "--data.path", str(rows_file), "--trainer.accelerator", "cpu"]
    model = ["--model.model_name", "nowhere", "--model.weighting", "DFT", "--model.dtype", "float32"]
    assert main(["fit", *data, *model, "--trainer.precision", precision, "--run_dir", "run"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dft: error: ")
    assert precision in said
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_beside_a_base_in_4_bits(tmp_path, rows_file, precision):
    module = ADAMW | {"lora": LoRA(rank=2, modules_to_save=["norm"]), "quantization": "nf4"}
    tuner, _, trainer = fit(saved(tmp_path / "model"), rows_file, module=module, precision=precision, max_steps=1)
    assert {p.dtype for p in tuner.parameters() if p.requires_grad} == {torch.float32}
    states = trainer.optimizers[0].state.values()
    assert {value.dtype for state in states for key, value in state.items() if key != "step"} == {torch.float32}


def test_small_steps_are_not_lost_in_half_precision(model_dir, rows_file):
    """A rate of 1e-5 moves float32 everywhere, and bfloat16 almost nowhere."""
    shares = {}
    for dtype in ("auto", "bfloat16"):
        module = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0), "warmup_ratio": 0.0}
        module |= {"lora": LoRA(rank=4, dtype=dtype), "lr_schedule": "constant"}
        torch.manual_seed(0)

        class Keep(RunSummary):
            def on_train_start(self, trainer, pl_module):
                self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters() if "lora_A" in n}

        keep = Keep()
        tuner = fit(model_dir, rows_file, module=module, precision="bf16-true", callbacks=[keep], max_steps=3)[0]
        changed = torch.cat([(p != keep.before[n]).flatten() for n, p in tuner.named_parameters() if "lora_A" in n])
        shares[dtype] = float(changed.float().mean())
    assert shares["auto"] > 0.99
    assert shares["bfloat16"] < 0.5


@pytest.mark.parametrize("move", [lambda network: network.bfloat16(), lambda network: network.to(dtype=torch.float16)])
def test_a_cast_leaves_adapters_and_their_values_alone(model_dir, move):
    from conftest import tiny_model

    network = WeightedLM(add_lora(tiny_model(), LoRA(rank=2, modules_to_save=["norm"])))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    move(network)
    for name, parameter in network.named_parameters():
        assert (parameter.dtype == torch.float32) == of_adapter(name), name
        assert not of_adapter(name) or torch.equal(parameter, before[name]), name


def test_the_first_values_do_not_depend_on_the_precision(model_dir, rows_file):
    found = []
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        torch.manual_seed(3)
        tuner = FineTuner(str(model_dir), DFT(), lora=LoRA(rank=2))
        torch.set_default_dtype(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        try:
            tuner.configure_model()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(torch.cat([p.flatten() for n, p in tuner.named_parameters() if "lora_A" in n]))
    assert all(torch.equal(found[0], other) for other in found)
    assert not torch.equal(found[0], found[0].bfloat16().float())


def test_a_run_of_adapters_in_bfloat16_resumes_in_float32(model_dir, rows_file, tmp_path, caplog):
    """As all of them were, and it is said."""
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True, "precision": "bf16-true"}
    old, new = ({"module": ADAMW | {"lora": LoRA(rank=2, dtype=dtype)}} for dtype in ("bfloat16", "auto"))
    fit(model_dir, rows_file, callbacks=[Checkpoints()], max_steps=1, **options, **old)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    tuner, _, _ = fit(model_dir, rows_file, max_steps=2, ckpt_path=last, **options, **new)
    assert {p.dtype for p in tuner.parameters() if p.requires_grad} == {torch.float32}
    assert "dtype of the adapters torch.bfloat16 → torch.float32" in caplog.text


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
@pytest.mark.parametrize(
    "name", ["norm", "input_layernorm", "down_proj", "mlp", "embed_tokens", "lm_head", "self_attn"]
)
def test_full_copies_of_any_module_begin_as_it(model_dir, rows_file, name, precision):
    """The copy on is the reference, the copy off, to the bit; and it learns."""
    from test_adapters import Watched

    module = {"lora": LoRA(rank=2, modules_to_save=[name]), "dtype": "auto", "warmup_ratio": 0.0}
    module["optimizer"] = lambda p: torch.optim.SGD(p, lr=1.0)
    given = {"module": module, "kind": Watched, "max_steps": 2, "precision": precision}
    tuner = fit(model_dir, rows_file, ImportanceWeighted(), **given)[0]
    copies = {n: p for n, p in tuner.named_parameters() if ".modules_to_save." in n}
    assert {p.dtype for p in copies.values()} == {torch.float32}
    originals = dict(tuner.named_parameters())
    for own, parameter in copies.items():
        original = originals[own.replace("modules_to_save.default", "original_module")]
        assert not original.requires_grad
        assert not torch.equal(parameter, original.float())
    if precision != "bf16-true":  # where a copy computes in float32, and what it copies in bfloat16
        assert torch.equal(tuner.seen[0], torch.ones_like(tuner.seen[0]))
    assert isinstance(tuner.network.head, nn.Linear)
