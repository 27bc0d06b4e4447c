"""What two ranks that share the weights have learnt, exported by the callback and from their checkpoint."""

import pytest
import torch
from cases import ADAPTER, Case, prepare
from harness import fit
from peft import PeftModel
from ranks import start
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.tensors import state_of

pytestmark = pytest.mark.slow  # starts other processes

IDS = torch.arange(3, 40)[None]
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), "warmup_ratio": 0.0}
CASES = {
    "tied": Case(model="tied"),
    "soft-cap": Case(model="gemma2"),
    "LoRA": Case(module=ADAPTER),
    "rank-stabilised, tied": Case(model="tied", module={"lora": LoRA(rank=4, rslora=True)}),
}


def train_all(folder):
    """Each case on these ranks; the first keeps the weights of the live model, by its own names."""
    for name, case in CASES.items():
        module, _, trainer = fit(
            folder / case.model,
            folder / "rows.jsonl",
            module=FAST | case.module,
            data={"micro_batch_size": 4},
            devices=2,
            strategy=FSDP2Strategy(),
            default_root_dir=folder / name,
            enable_checkpointing=True,
            callbacks=[Checkpoints(), Export(merge_lora=True)],
        )
        live = state_of(module.network, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            torch.save(live, folder / name / "live.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    prepare(folder)
    start(2, __file__, "train_all", folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_training(trained, tmp_path, name):
    """To the bit; merged, to some units of float32 rounding, as (W + BA)x and Wx + BAx are added in another order."""
    case, run = CASES[name], trained / name
    lora, base = case.module.get("lora"), trained / case.model
    live = AutoModelForCausalLM.from_pretrained(base)
    before = logits(live)
    live = live if lora is None else add_lora(live, lora)
    live.load_state_dict({key.removeprefix("model."): value for key, value in torch.load(run / "live.pt").items()})
    truth = logits(live)
    assert (truth - before).abs().max() > 1e-2
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["export", last, str(tmp_path / "out")]) == 0
    for folder in (run / "export", tmp_path / "out"):
        if lora is None:
            back = AutoModelForCausalLM.from_pretrained(folder)
        else:
            back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert torch.equal(logits(back), truth)
    if lora is not None:
        assert main(["export", last, str(tmp_path / "merged"), "--merge_lora", "true"]) == 0
        for folder in (run / "export-merged", tmp_path / "merged"):
            merged = logits(AutoModelForCausalLM.from_pretrained(folder))
            torch.testing.assert_close(merged, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
