"""A `FineTuner` can be deep-copied at any time, and the copy is a model of its own."""

import copy
import functools
import threading

import lightning.pytorch as pl
import pytest
import torch
from harness import fit
from test_resume import PLAIN

from dft_lightning.callbacks import Checkpoints, Preemption, TokenProbabilities
from dft_lightning.models import LoRA
from dft_lightning.weighting import ASFT, PSFT, TALR

HOOKS = ["setup", "on_fit_start", "on_train_start", "on_before_backward", "on_before_optimizer_step", "on_train_end"]
HOOKS += ["on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end"]


class Copies(pl.Callback):
    """Copies the module at every moment, and keeps the last copy."""

    def __init__(self):
        self.seen, self.copy = set(), None
        for hook in HOOKS:
            setattr(self, hook, functools.partial(self.take, hook))

    def take(self, hook, trainer, module, *_, **__):
        self.seen.add(hook)
        self.copy = copy.deepcopy(module)


class Recipe:
    """As the command line's optimizer is: an object that cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1)


CASES = {
    "plain": {},
    "full": {"module": {"activation_checkpointing": "full"}},
    "selective lora": {"module": {"activation_checkpointing": "selective", "lora": LoRA(rank=4)}},
    "copy": {"weighting": ASFT(), "module": {"reference": "copy"}},
    "step scope": {"weighting": TALR()},
    "old policy": {"weighting": PSFT()},
    "bf16": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("case", CASES)
def test_at_any_time_and_it_computes_with_its_own_weights(model_dir, rows_file, tmp_path, case):
    options, copies = dict(CASES[case]), Copies()
    module = PLAIN | {"optimizer": Recipe()} | options.pop("module", {})
    callbacks = [Preemption(), TokenProbabilities(every_n_steps=1), Checkpoints(1, asynchronous=True), copies]
    data = {"micro_batch_size": 4, "val_size": 4}
    options |= {
        "callbacks": callbacks,
        "enable_checkpointing": True,
        "default_root_dir": tmp_path,
        "max_steps": 2,
        "val_check_interval": 1,
    }
    tuner, _, trainer = fit(model_dir, rows_file, options.pop("weighting", None), module=module, data=data, **options)
    assert copies.seen == set(HOOKS)
    made = copies.copy
    assert made._trainer is None
    assert made.optimization is tuner.optimization
    assert made.step.wishes == {}
    batch = trainer.datamodule.step(0, 0)[0]
    before = tuner.network.logp(batch)
    assert torch.equal(made.network.logp(batch), before)
    for network in (made.network.train(), tuner.network.train()):
        network.hidden(batch).sum().backward()
    grads = [[w.grad.clone() for w in network.parameters() if w.grad is not None] for network in (made, tuner)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    with torch.no_grad():
        for weight in made.network.parameters():
            weight.zero_()
    made.zero_grad()
    assert torch.equal(tuner.network.logp(batch), before)
    assert not made.network.train().hidden(batch).any()


@pytest.mark.slow
def test_a_compiled_one_is_copied_with_layers_of_its_own(model_dir, rows_file, tmp_path):
    module = PLAIN | {"compile": True}
    data = {"packing": True, "micro_batch_size": 1}
    tuner, _, trainer = fit(model_dir, rows_file, module=module, data=data, default_root_dir=tmp_path, max_steps=1)
    made, batch = copy.deepcopy(tuner), trainer.datamodule.step(0, 0)[0]
    with torch.no_grad():
        for weight in made.network.base.get_decoder().layers.parameters():
            weight.zero_()
    embedded = made.network.base.get_decoder().norm(made.network.base.get_input_embeddings()(batch.input_ids))
    assert torch.equal(made.network.train().hidden(batch), embedded.flatten(0, 1).index_select(0, batch.supervised))
