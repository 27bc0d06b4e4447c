"""References without a second model in memory where that can be, the frozen copy, the old policy, and divisors."""

from dataclasses import dataclass

import pytest
import torch
from harness import fit
from lightning.pytorch.callbacks import ModelCheckpoint

from dft_lightning import FineTuner
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.old_policy import OldPolicy, window_of
from dft_lightning.weighting import (
    ASFT,
    DFT,
    TALR,
    EntropyBonus,
    ImportanceWeighted,
    LabelSmoothing,
    Mixed,
    Renormalized,
    Thresholded,
    TokenStats,
    TokenWeighting,
    Uniform,
)
from dft_lightning.weighting.base import REF_DISTRIBUTION
from dft_lightning.weighting.catalogue import entries
from dft_lightning.weighting.composition import Modifier

ADAPTER = {"lora": LoRA(rank=4)}


@dataclass(frozen=True)
class Ratio(TokenWeighting):
    """The probability against that under the policy of up to `window` steps ago."""

    window: int = 2

    needs = frozenset({"old_logp"})

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return (tokens.logp - tokens.need("old_logp")).exp()


@dataclass(frozen=True)
class MeanOne(TokenWeighting):
    """p, over the step's mean of it."""

    divisor = "weights"

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return tokens.p


@dataclass(frozen=True)
class LikelyOnly(TokenWeighting):
    """1 for the tokens above a probability, which alone are counted."""

    at_least: float = 0.011

    divisor = "selected"

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return (tokens.p >= self.at_least).to(tokens.logp.dtype)


class Watched(FineTuner):
    """Keeps its training tokens."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), self.trained_on]
        return loss


def relative(ours, truth):
    return float((ours - truth).norm() / truth.norm())


class TestTheReferencesDistribution:
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    @pytest.mark.parametrize("module", [{}, ADAPTER], ids=["copy", "adapter off"])
    def test_while_the_model_is_its_reference_asft_is_dft(self, model_dir, rows_file, module, direction):
        """The first step's gradient; from the second on, the anchor pulls. In float32, p·Σq − q of the forward
        direction is zero to the rounding of Σq, 6e-8 of the strength, where the gradient itself is about 0.1."""
        _, anchored, _ = fit(model_dir, rows_file, ASFT(1.0, direction), module=module, max_steps=3)
        _, alone, _ = fit(model_dir, rows_file, DFT(), module=module, max_steps=3)
        first, third = (relative(anchored.gradients[i], alone.gradients[i]) for i in (0, 2))
        assert first < 1e-5
        assert third > 10 * first

    def test_with_the_adapter_off_the_kl_is_zero_to_the_bit(self, model_dir, rows_file):
        """The reverse direction's targets are p·(log p − log ref − KL): zero if every logit is the reference's."""
        _, anchored, _ = fit(model_dir, rows_file, ASFT(1e6, "reverse"), module=ADAPTER, max_steps=1)
        _, without, _ = fit(model_dir, rows_file, ASFT(0.0, "reverse"), module=ADAPTER, max_steps=1)
        assert torch.equal(anchored.gradients[0], without.gradients[0])
        assert anchored.gradients[0].norm() > 0.0

    def test_and_so_is_the_ratio(self, model_dir, rows_file):
        for level in ("token", "sequence"):
            module, _, _ = fit(
                model_dir, rows_file, ImportanceWeighted(level=level), module=ADAPTER, max_steps=1, kind=Watched
            )
            assert torch.equal(module.seen[0].weight, torch.ones_like(module.seen[0].weight))

    def test_the_copy_is_no_part_of_the_module(self, model_dir, rows_file, tmp_path):
        module, _, _trainer = fit(model_dir, rows_file, ASFT(), max_steps=1)
        copies = [tensor.data_ptr() for tensor in module._initial[0].state_dict().values()]
        own = {tensor.data_ptr() for tensor in module.state_dict().values()}
        assert own.isdisjoint(copies)
        assert all("_initial" not in name for name in module.state_dict())
        assert not any(parameter.requires_grad for parameter in module._initial[0].parameters())

    def test_the_copy_stays_what_it_was(self, model_dir, rows_file):
        module, _, _ = fit(model_dir, rows_file, ASFT(), max_steps=3)
        fresh = module.initial_model().state_dict()
        for name, tensor in module._initial[0].model.state_dict().items():
            assert torch.equal(tensor, fresh[name])
        assert any(not torch.equal(tensor, fresh[name]) for name, tensor in module.model.state_dict().items())

    def test_a_cache_cannot_hold_it(self, model_dir, rows_file):
        with pytest.raises(UserError, match="use 'copy'"):
            fit(model_dir, rows_file, ASFT(), module={"reference": "cache"})

    def test_a_copy_serves_single_log_probabilities_too(self, model_dir, rows_file):
        _, copy, _ = fit(model_dir, rows_file, ImportanceWeighted(), module={"reference": "copy"}, max_steps=3)
        _, cache, _ = fit(model_dir, rows_file, ImportanceWeighted(), module={"reference": "cache"}, max_steps=3)
        for ours, truth in zip(copy.gradients, cache.gradients, strict=True):
            assert relative(ours, truth) < 1e-5

    def test_packed(self, model_dir, rows_file):
        gradients = [
            fit(model_dir, rows_file, ASFT(0.5), data={"micro_batch_size": 2, "packing": how}, max_steps=2)[1].gradients
            for how in (False, True, "padding_free")
        ]
        for how in gradients[1:]:
            for ours, truth in zip(how, gradients[0], strict=True):
                assert relative(ours, truth) < 1e-5


class TestTheOldPolicy:
    def test_it_is_the_policy_at_the_windows_start(self, model_dir, rows_file):
        """In the first step of a window ratios are 1 to the bit; in the second, against that same policy."""
        module, _, _ = fit(model_dir, rows_file, Ratio(2), max_steps=4, kind=Watched, data={"micro_batch_size": 4})
        steps = [module.seen[i : i + 2] for i in range(0, 8, 2)]
        for number, parts in enumerate(steps):
            off = max(float((part.weight - 1.0).abs().max()) for part in parts if len(part))
            assert off == 0.0 if number % 2 == 0 else off > 1e-6
        later, _, _ = fit(model_dir, rows_file, Ratio(2), max_steps=2, kind=Watched, data={"micro_batch_size": 4})
        again, _, _ = fit(model_dir, rows_file, Ratio(1), max_steps=2, kind=Watched, data={"micro_batch_size": 4})
        assert torch.equal(later.seen[0].logp, again.seen[0].logp)
        assert all(torch.equal(part.weight, torch.ones_like(part.weight)) for part in again.seen)

    def test_a_run_that_goes_on_in_the_middle_of_a_window_keeps_it(self, model_dir, rows_file, tmp_path):
        def run(steps, **more):
            saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
            return fit(
                model_dir,
                rows_file,
                Ratio(3),
                max_epochs=2,
                max_steps=steps,
                callbacks=[saving],
                enable_checkpointing=True,
                **more,
            )

        _, whole, _ = run(5)
        _, rest, _ = run(5, ckpt_path=str(tmp_path / "saved" / "step=4.ckpt"), data={"micro_batch_size": 2})
        assert relative(rest.gradients[0], whole.gradients[4]) < 1e-5

    def test_windows_reach_over_epochs(self, model_dir, rows_file):
        module, _, trainer = fit(model_dir, rows_file, Ratio(100), max_epochs=2)
        assert trainer.global_step > trainer.num_training_batches
        assert module.old_policy.start == 0

    def test_validation_is_its_own_old_policy(self, model_dir, rows_file):
        _, _, trainer = fit(model_dir, rows_file, Ratio(4), max_steps=3, data={"val_size": 4})
        assert float(trainer.callback_metrics["val/weight_mean"]) == pytest.approx(1.0, abs=1e-6)

    def test_windows_that_differ_are_refused(self):
        assert window_of(EntropyBonus(Ratio(4))) == 4
        assert window_of(DFT()) == 0
        with pytest.raises(UserError, match="alike in all its parts"):
            window_of(Pair(Ratio(2), Ratio(4)))
        with pytest.raises(UserError, match="1 or more"):
            window_of(Ratio(0))

    def test_a_modifier_of_ones_own_has_a_window_too(self, model_dir, rows_file):
        """It is no leaf, and its part needs no old policy."""
        assert window_of(Trust(Uniform(), 2)) == 2
        module, _, _ = fit(model_dir, rows_file, Trust(Uniform(), 2), max_steps=2, kind=Watched)
        first, second = (float((part.weight - 1.0).abs().max()) for part in module.seen)
        assert first == 0.0
        assert second > 1e-6

    @pytest.mark.parametrize(
        ("then", "now", "allowed"),
        [
            ({"max_steps": 3}, {"max_epochs": 2, "max_steps": 6}, ()),
            ({"max_epochs": 2, "max_steps": 6}, {"max_epochs": 2, "max_steps": 6, "window": 4}, {"weighting"}),
            ({"max_epochs": 2, "max_steps": 6}, {"max_epochs": 2, "max_steps": 6, "data": {"seed": 9}}, {"data"}),
        ],
        ids=["longer", "another window", "another order"],
    )
    def test_where_it_does_not_reach_a_new_one_begins(self, model_dir, rows_file, tmp_path, then, now, allowed):
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(model_dir, rows_file, Ratio(5), callbacks=[saving], enable_checkpointing=True, **then)
        now = dict(now)
        module, _, trainer = fit(
            model_dir, rows_file, Ratio(now.pop("window", 5)), kind=Watched, allow_changes=frozenset(allowed),
            ckpt_path=str(tmp_path / "saved" / "step=3.ckpt"), **now,
        )  # fmt: skip
        assert trainer.global_step == 6
        assert torch.equal(module.seen[0].weight, torch.ones_like(module.seen[0].weight))

    def test_a_second_fit_begins_with_its_own(self, model_dir, rows_file):
        """The model has been trained meanwhile; against the first fit's policy its ratios would not be 1."""
        module, _, _ = fit(model_dir, rows_file, Ratio(9), max_steps=2, kind=Watched)
        trainer, data = module.trainer, module.trainer.datamodule
        module.seen = []
        again = type(trainer)(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        again.fit(module, data)
        assert torch.equal(module.seen[0].weight, torch.ones_like(module.seen[0].weight))

    def test_with_an_adapters_dropout_it_is_refused(self, model_dir, rows_file):
        with pytest.raises(UserError, match="set it to 0"):
            fit(model_dir, rows_file, Ratio(2), module={"lora": LoRA(rank=4, dropout=0.1)})

    def test_state(self):
        old = OldPolicy(3, 6, 8, {4: torch.tensor([-1.0, -2.0]), 2: torch.tensor([-0.5])})
        other = OldPolicy(3)
        other.load(old.state())
        assert {row: values.tolist() for row, values in other.values.items()} == {4: [-1.0, -2.0], 2: [-0.5]}
        assert [other.is_due(step) for step in (5, 6, 7, 8)] == [True, False, False, True]
        assert [list(other.steps(step, 11)) for step in (6, 8, 9)] == [[6, 7, 8], [8], [9, 10]]


@dataclass(frozen=True)
class Trust(Modifier):
    """A part, times the ratio to the old policy."""

    window: int = 2

    own_needs = frozenset({"old_logp"})

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return self.of.weights(tokens) * (tokens.logp - tokens.need("old_logp")).exp()


@dataclass(frozen=True)
class Pair(TokenWeighting):
    """Of two others."""

    first: TokenWeighting
    second: TokenWeighting

    needs = frozenset({"old_logp"})

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return self.first.weights(tokens) + self.second.weights(tokens)


class TestTheDivisor:
    """A step's sum over its tokens, divided by the sum of weights, or by how many were selected."""

    @pytest.mark.parametrize("normalize", ["tokens", "sequences"])
    @pytest.mark.parametrize("weighting", [MeanOne(), LikelyOnly()], ids=repr)
    def test_the_gradient_is_divided_by_it(self, model_dir, rows_file, weighting, normalize):
        """Against the same weights under the plain divisor: their ratio is that of the divisors."""
        options = {"kind": Watched, "max_steps": 1, "data": {"micro_batch_size": 8}, "module": {"normalize": normalize}}
        module, ours, trainer = fit(model_dir, rows_file, weighting, **options)
        plain = type("Plain", (type(weighting),), {"divisor": "tokens"})()
        _, theirs, _ = fit(model_dir, rows_file, plain, **options)
        (tokens,) = module.seen
        counted = tokens.weight if weighting.divisor == "weights" else (tokens.weight != 0).float()
        share = counted.mean() if normalize == "tokens" else tokens.sequence_mean(counted)[firsts(tokens)].mean()
        assert 0.0 < share < 0.99
        assert relative(ours.gradients[0] * share, theirs.gradients[0]) < 1e-5
        objective = float(trainer.callback_metrics["train/objective"])
        truth = (tokens.weight * -tokens.logp).sum() / counted.sum()
        if normalize == "tokens":
            assert objective == pytest.approx(float(truth), rel=1e-5)

    def test_a_step_without_any_weight_changes_nothing(self, model_dir, rows_file, recwarn):
        module, recorder, _ = fit(model_dir, rows_file, LikelyOnly(1.1), max_steps=2)
        assert len(recorder.gradients) == 2
        said = [str(warning.message) for warning in recwarn if "nothing is learnt" in str(warning.message)]
        assert said == ["all weights of step 1 are 0: nothing is learnt from it"]
        assert not torch.cat(recorder.gradients).any()
        fresh = module.initial_model().state_dict()
        assert all(torch.equal(tensor, fresh[name]) for name, tensor in module.model.state_dict().items())


def firsts(tokens):
    """Where each sequence begins."""
    start = torch.ones_like(tokens.sequence, dtype=torch.bool)
    start[1:] = tokens.sequence[1:] != tokens.sequence[:-1]
    return start


@pytest.mark.parametrize("normalize", ["tokens", "sequences", "micro_batch"])
@pytest.mark.parametrize("inner", [Renormalized(DFT()), Thresholded(0.011)], ids=repr)
def test_inside_a_modifier_the_divisor_is_the_same(model_dir, rows_file, inner, normalize):
    """A modifier that changes nothing: outermost, the step is divided once; inside, the weights are, token by token."""
    options = {"max_steps": 1, "module": {"normalize": normalize}, "data": {"micro_batch_size": 4}}
    outer = fit(model_dir, rows_file, inner, **options)[1].gradients[0]
    wrapped = fit(model_dir, rows_file, Mixed(inner, share=0.0), **options)[1].gradients[0]
    assert relative(wrapped, outer) < 1e-5


@pytest.mark.parametrize(
    "weighting",
    [Mixed(LabelSmoothing(0.9), Renormalized(DFT()), share=1e-4), EntropyBonus(TALR(), 1.0)],
    ids=["mixed", "bonus"],
)
def test_validation_has_the_targets_of_a_weighting_that_looks_at_whole_steps(model_dir, rows_file, weighting):
    """The same rows to train and to validate on, in one step, and nothing learnt in between."""
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    data = {"global_batch_size": 26, "micro_batch_size": 7, "val_path": str(rows_file)}
    _, _, trainer = fit(model_dir, rows_file, weighting, module=still, data=data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name in ("objective", "weight_mean", "nll"):
        assert found[f"val/{name}"] == pytest.approx(found[f"train/{name}"], rel=1e-5)


#: Every weighting of the package whose reference may be a cache.
CACHED = [entry.cls for entry in entries() if {"ref_logp", REF_DISTRIBUTION} & set(entry.needs or ()) == {"ref_logp"}]


class TestWorkers:
    """A cached reference reaches the processes that prepare batches, in every command."""

    def metrics(self, model_dir, rows_file, weighting, workers, command):
        data = {"num_workers": workers, "val_size": 4, "test_path": str(rows_file), "micro_batch_size": 4}
        module, recorder, trainer = fit(model_dir, rows_file, weighting, data=data, max_steps=0 if command else 2)
        if not command:
            return recorder.gradients
        found = getattr(trainer, command)(module, trainer.datamodule)
        return [batch.ref_logp for batch, _ in found] if command == "predict" else found

    @pytest.mark.parametrize("command", ["", "validate", "test", "predict"])
    @pytest.mark.parametrize("kind", CACHED)
    def test_with_and_without_them(self, model_dir, rows_file, kind, command):
        alone, others = (self.metrics(model_dir, rows_file, kind(), workers, command) for workers in (0, 2))
        assert len(alone) == len(others) > 0
        for ours, truth in zip(others, alone, strict=True):
            assert torch.equal(ours, truth) if isinstance(truth, torch.Tensor) else ours == truth

    def test_they_are_all(self):
        assert {kind.__name__ for kind in CACHED} >= {"ImportanceWeighted", "Rho1"}


def test_rows_that_no_cache_knows_are_refused(model_dir, rows_file):
    """Loaders of one's own in place of a data module: at the start, and not at the first step."""
    trainer = fit(model_dir, rows_file, max_steps=1)[2]
    loader, other = trainer.datamodule.train_dataloader(), FineTuner(str(model_dir), ImportanceWeighted())
    again = type(trainer)(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"ImportanceWeighted compares .* set model\.reference to copy"):
        again.fit(other, loader)
