"""Every optimizer trains and resumes to the bit, or is refused by name; what is printed is what the groups are."""

import inspect
from functools import partial

import pytest
import torch
from conftest import tiny_model
from resuming import StopAfter, last, resumes_to_the_bit, run

from dft_lightning import FineTuner
from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.optimizers import MuonAdamW, MuonWithAdamW, Optimization, described, parts_of
from dft_lightning.weighting import DFT

CLASSES = [
    each
    for each in (getattr(torch.optim, name) for name in torch.optim.__all__)
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
]
REFUSED = {"LBFGS": "evaluates the loss several times", "SparseAdam": "takes sparse gradients only"}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_of_torch_resumes_to_the_bit_or_is_refused_by_name(model_dir, rows_file, tmp_path, cls):
    module = {"optimizer": partial(cls, lr=0.01)}
    if cls.__name__ in REFUSED:
        with pytest.raises(UserError, match=f"model.optimizer {cls.__name__} {REFUSED[cls.__name__]}"):
            FineTuner(str(model_dir), DFT(), **module)
        return
    resumes_to_the_bit(model_dir, rows_file, tmp_path, module)


OPTIONS = [
    {"fused": True},
    pytest.param({"foreach": True}, marks=pytest.mark.exhaustive),
    pytest.param({"amsgrad": True}, marks=pytest.mark.exhaustive),
    {"lr": torch.tensor(0.01)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ways_to_compute_a_step(model_dir, rows_file, tmp_path, options):
    resumes_to_the_bit(model_dir, rows_file, tmp_path, {"optimizer": partial(torch.optim.AdamW, **options)})


def test_adafactor_of_transformers(model_dir, rows_file, tmp_path):
    from transformers.optimization import Adafactor

    with pytest.raises(UserError, match=r"own learning rate.*lr 1e-3 --model.optimizer.relative_step false"):
        FineTuner(str(model_dir), DFT(), optimizer=Adafactor)
    resumes_to_the_bit(model_dir, rows_file, tmp_path, {"optimizer": partial(Adafactor, lr=1e-3, relative_step=False)})


def of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.optim")
    kinds = (getattr(bnb, name) for name in dir(bnb))
    found = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)]
    return sorted(found, key=lambda kind: kind.__name__)


def outcome(model, rows, folder, cls):
    """Empty where it trains and resumes to the bit; else what is said."""
    try:
        resumes_to_the_bit(model, rows, folder, {"optimizer": partial(cls, lr=0.01)})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_class_of_bitsandbytes(model_dir, rows_file, tmp_path):
    """On a CPU some have no kernel: these are refused before the first step."""
    said = {cls.__name__: outcome(model_dir, rows_file, tmp_path / cls.__name__, cls) for cls in of_bitsandbytes()}
    refused = {name: text for name, text in said.items() if text}
    assert len(refused) < len(said) / 2
    assert all(f"model.optimizer {name}" in text for name, text in refused.items())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, dora=True)], ids=["full", "dora"])
def test_muon_takes_matrices_and_adamw_the_rest(model_dir, rows_file, tmp_path, lora):
    module = {"optimizer": partial(torch.optim.Muon, lr=0.02), "muon_adamw": MuonAdamW(lr=0.003), "lora": lora}
    tuner, trainer = resumes_to_the_bit(model_dir, rows_file, tmp_path, module | {"lr_schedule": "constant"})
    muon, adamw = (part.param_groups[0] for part in parts_of(trainer.optimizers[0]))
    assert (muon["lr"], adamw["lr"]) == (0.02, 0.003)
    names = {id(value): name for name, value in tuner.network.named_parameters()}
    of_muon, of_adamw = ([names[id(p)] for p in group["params"]] for group in (muon, adamw))
    if lora is None:
        assert all("_proj" in name for name in of_muon)
        assert len(of_muon) == 14
        assert {name.rpartition(".")[0].rpartition(".")[2] for name in of_adamw} >= {"norm", "embed_tokens", "lm_head"}
    else:
        assert all("lora_A" in name or "lora_B" in name for name in of_muon)
        assert all("magnitude" in name for name in of_adamw)
    trained = [p for p in tuner.network.parameters() if p.requires_grad]
    assert len(of_muon) + len(of_adamw) == len(trained)


def test_muons_step_is_that_of_both_alone():
    """The two have the gradients of their own parameters, and one schedule."""
    model = tiny_model()
    twin = tiny_model()
    make = Optimization(partial(torch.optim.Muon, lr=0.02), MuonAdamW(lr=0.003))
    together = make.build(model)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    matrices = {id(p) for p in parts_of(together)[0].param_groups[0]["params"]}
    alone = [
        torch.optim.Muon([other for one, other in pairs if id(one) in matrices], lr=0.02),
        torch.optim.AdamW(
            [other for one, other in pairs if id(one) not in matrices], lr=0.003, betas=(0.9, 0.95), weight_decay=0.01
        ),
    ]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for one, other in pairs:
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        together.step()
        for part in alone:
            part.step()
    assert all(torch.equal(one, other) for one, other in pairs)


def test_muon_without_a_rest_is_torchs_own(model_dir):
    made = Optimization(partial(torch.optim.Muon, lr=0.02))
    model = tiny_model().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    assert type(made.build(model)) is torch.optim.Muon
    assert type(made.build(tiny_model())) is MuonWithAdamW
    with pytest.raises(UserError, match=r"all trained parameters are Muon's"):
        Optimization(partial(torch.optim.Muon, lr=0.02), MuonAdamW()).build(model)
    with pytest.raises(UserError, match=r"muon_adamw is given, but model.optimizer is AdamW"):
        FineTuner(str(model_dir), DFT(), muon_adamw=MuonAdamW())


WRONG = [
    (partial(torch.optim.AdamW, lr=-1.0), r"model.optimizer.lr is -1.0"),
    (partial(torch.optim.SGD, lr=float("nan")), r"model.optimizer.lr is nan; expected a number of at least 0"),
    (partial(torch.optim.SGD, lr=float("inf")), r"model.optimizer.lr is inf; expected a number of at least 0"),
    (partial(torch.optim.AdamW, betas=(2.0, 0.9)), r"model.optimizer.betas is \(2.0, 0.9\)"),
    (partial(torch.optim.AdamW, weight_decay=-0.1), r"model.optimizer.weight_decay is -0.1"),
    (partial(torch.optim.AdamW, eps=-1.0), r"model.optimizer.eps is -1.0"),
    (partial(torch.optim.SGD, momentun=0.9), r"model.optimizer.momentun is 0.9"),
    (partial(torch.optim.SGD, nesterov=True), r"model.optimizer.nesterov is True"),
    (partial(torch.optim.AdamW, differentiable=True), "differentiable is true"),
    (partial(torch.optim.Muon, ns_steps=5, momentum=-1.0), "model.optimizer.momentum is -1.0"),
    (lambda p: p, "expected a torch.optim.Optimizer"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_named_before_anything_is_loaded(make, message):
    with pytest.raises(UserError, match=message):
        FineTuner("no/such/model", DFT(), optimizer=make)


def test_what_cannot_step_on_the_device_is_refused_before_the_first_step(model_dir, rows_file, tmp_path):
    class TwoLooks(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    module = {"optimizer": partial(torch.optim.AdamW, capturable=True)}
    with pytest.raises(UserError, match=r"model.optimizer AdamW cannot take a step on cpu"):
        run(model_dir, rows_file, tmp_path, module)
    with pytest.raises(UserError, match="TwoLooks evaluates the loss 2 times per step"):
        run(model_dir, rows_file, tmp_path, {"optimizer": partial(TwoLooks, lr=0.1)})


def test_what_is_printed_is_what_the_groups_are(model_dir, rows_file, tmp_path):
    make = partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    tuner, _, trainer = run(model_dir, rows_file, tmp_path, {"optimizer": make, "weight_decay_exempt": ["norm"]})
    decayed, free = trainer.optimizers[0].param_groups
    norms = [p for name, p in tuner.network.named_parameters() if "norm" in name]
    assert [id(p) for p in free["params"]] == [id(p) for p in norms]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    shown = run_facts(trainer, tuner)["optimizer"].splitlines()
    numel = sum(p.numel() for p in decayed["params"])
    assert shown[0].startswith("AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-07, weight_decay=0.3)")
    assert shown[0].endswith(f"on {numel:,} parameters in {len(decayed['params'])} tensors")
    assert (
        shown[1] == f"AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-07, weight_decay=0.0) on {5 * 32} parameters in 5 tensors"
    )
    assert described(trainer.optimizers[0], tuner._settings) == shown


def test_several_groups_resume_and_other_settings_win(model_dir, rows_file, tmp_path, caplog):
    def module(decay, **more):
        exempt = {"weight_decay_exempt": ["norm", "embedding"]}
        return {"optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=decay)} | exempt | more

    resumes_to_the_bit(model_dir, rows_file, tmp_path, module(0.1))
    assert "other settings" not in caplog.text
    run(model_dir, rows_file, tmp_path / "again", module(0.1), StopAfter(2))
    _, _, trainer = run(model_dir, rows_file, tmp_path / "again", module(0.2), ckpt_path=last(tmp_path / "again"))
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.2, 0.0]
    assert "weight_decay 0.1 → 0.2" in caplog.text
    with pytest.raises(UserError, match=r"parameters \(weight_decay_exempt\).*its state does not fit"):
        run(
            model_dir,
            rows_file,
            tmp_path / "again",
            module(0.1, weight_decay_exempt=None),
            ckpt_path=last(tmp_path / "again"),
        )


def test_a_checkpoint_of_an_earlier_version_resumes(model_dir, rows_file, tmp_path):
    """It has one group, and knows of none of the newer options."""
    make = {"optimizer": partial(torch.optim.AdamW, lr=0.01)}
    whole = run(model_dir, rows_file, tmp_path / "whole", make)[0].network.state_dict()
    run(model_dir, rows_file, tmp_path / "old", make, StopAfter(2))
    stored = torch.load(last(tmp_path / "old"), weights_only=True)
    for name in ("freeze", "train_only", "weight_decay_exempt", "lr_schedule_kwargs", "muon_adamw"):
        del stored["hyper_parameters"][name]
    facts = stored["dft_lightning"]
    del facts["identity"]["parameters"], facts["data_seed"], facts["optimizer_module"]
    del facts["settings"]["lr_schedule_kwargs"]
    torch.save(stored, tmp_path / "old.ckpt")
    ours = run(model_dir, rows_file, tmp_path / "old", make, ckpt_path=tmp_path / "old.ckpt")[0].network.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


def test_a_class_of_the_same_name_in_another_package_is_refused(model_dir, rows_file, tmp_path):
    twin = type("AdamW", (torch.optim.AdamW,), {"__module__": "elsewhere"})
    run(model_dir, rows_file, tmp_path, {"optimizer": partial(torch.optim.AdamW, lr=0.01)}, StopAfter(2))
    with pytest.raises(UserError, match=r"optimizer \(module\): torch.optim.adamw → elsewhere"):
        run(model_dir, rows_file, tmp_path, {"optimizer": partial(twin, lr=0.01)}, ckpt_path=last(tmp_path))


def test_no_weight_decay_to_be_exempt_from(model_dir):
    with pytest.raises(UserError, match=r"model.optimizer Rprop has no weight decay"):
        FineTuner(str(model_dir), DFT(), optimizer=torch.optim.Rprop, weight_decay_exempt=["norm"])
    with pytest.raises(UserError, match=r"weight_decay_exempt has \['heads'\]"):
        FineTuner(str(model_dir), DFT(), weight_decay_exempt=["heads"])
