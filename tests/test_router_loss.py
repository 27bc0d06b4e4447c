"""The router loss: equal to transformers' where a step is one micro-batch, and independent of how a step is cut up."""

from dataclasses import dataclass

import pytest
import torch
from conftest import sums, write_jsonl
from harness import fit
from ranks import start
from routed import COEFFICIENT, FAMILIES, OTHERS, by_transformers, first_batch, given_to_transformers, routed_model

from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import LoRA, add_lora
from dft_lightning.router_loss import RouterLoss, routing_of
from dft_lightning.weighting import DFT, Renormalized, TokenWeighting, Uniform

#: Relative L2: some hundred units of float32 rounding, as for the loss itself; without the router loss it is over 2e-3.
BOUND = 1e-5
OFF = {"router_loss": "none"}


@dataclass(frozen=True)
class Median(TokenWeighting):
    """A user's weighting of step scope."""

    scope = "step"

    def weights(self, tokens):
        return tokens.p / tokens.p.median()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Makes the folder of a family, once."""
    known = {}

    def found(family, **changes):
        key = family, *sorted(changes.items())
        if key not in known:
            known[key] = routed_model(tmp_path_factory.mktemp(family), family, **changes)
        return known[key]

    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """26 rows: three steps of 8, and one of 2."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(26))


def relative(ours, truth):
    return float((ours - truth).norm() / truth.norm())


def rare(names, usual):
    """A covering part for `make test`, and all others for `make test-all`."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


class TestFormula:
    def test_by_hand(self):
        """Two routers, three tokens of which the last is padding, three experts, two for each token."""
        first = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [9.0, 9.0, 0.0]])
        second = torch.tensor([[0.0, 0.0, -1.0], [3.0, 0.0, 1.0], [0.0, 9.0, 9.0]])
        found = routing_of([first, second], torch.tensor([True, True, False]), 2)
        # chosen by the four real tokens: {0, 1}, {1, 2}, {0, 1}, {0, 2}
        assert found.chosen.tolist() == [3.0, 3.0, 2.0]
        assert found.count == 4
        probability = torch.cat([first[:2], second[:2]]).double().softmax(1).mean(0)
        expected = 3 * (probability * torch.tensor([3.0, 3.0, 2.0]) / 4).sum()
        assert float(found.balance) == pytest.approx(float(expected), rel=1e-6)

    def test_balanced_routing_costs_the_number_of_experts_for_each_token(self):
        """Its least value, by equation 4 of the paper with f summing to k."""
        logits = torch.eye(4) + torch.eye(4).roll(1, 0)
        assert float(routing_of([logits], torch.ones(4, dtype=torch.bool), 2).balance) == pytest.approx(2.0)

    def test_shares_of_micro_batches_add_up_to_the_loss_and_its_gradient(self):
        from dft_lightning.router_loss import share_of_balance

        logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
        real = torch.arange(12) % 5 != 0
        full = routing_of([logits], real, 2)
        (truth,) = torch.autograd.grad(full.balance, logits)
        parts = [routing_of([logits[a:b]], real[a:b], 2) for a, b in ((0, 3), (3, 4), (4, 12))]
        total = sum(share_of_balance(part, full.chosen, full.count) for part in parts)
        (ours,) = torch.autograd.grad(total, logits)
        assert float(total) == pytest.approx(float(full.balance), rel=1e-14)
        assert relative(ours, truth) < 1e-14

    def test_no_token_is_no_loss(self):
        logits = torch.randn(3, 4, requires_grad=True)
        found = routing_of([logits], torch.zeros(3, dtype=torch.bool), 2)
        assert float(found.balance) == 0.0
        assert torch.equal(torch.autograd.grad(found.balance, logits)[0], torch.zeros(3, 4))

    def test_probabilities_are_at_least_float32(self):
        logits = torch.randn(3, 4).bfloat16()
        found = routing_of([logits], torch.ones(3, dtype=torch.bool), 1)
        assert torch.allclose(found.probability, logits.float().softmax(1).double().sum(0), rtol=1e-6)


@pytest.mark.parametrize("family", rare(FAMILIES, {"mixtral", "qwen3_moe", "jetmoe"}))
def test_one_micro_batch_has_the_gradient_of_transformers(models, rows, family):
    """Padding is left out by the attention mask there, and by the row's length here."""
    model, batch = models(family), first_batch(models(family), rows)
    truth, gradient = by_transformers(load_model(ModelSource(str(model))), batch)
    _, without = by_transformers(load_model(ModelSource(str(model))), batch, output_router_logits=False)
    assert relative(without, gradient) > 100 * BOUND
    _, recorder, _ = fit(model, rows, Uniform(), max_steps=1)
    assert relative(recorder.gradients[0], gradient) < BOUND
    logged = recorder.logged[0]
    assert logged["train/router_loss"] == pytest.approx(float(truth.aux_loss), rel=1e-5)
    assert logged["train/objective"] + COEFFICIENT * logged["train/router_loss"] == pytest.approx(
        float(truth.loss), rel=1e-5
    )
    _, plain, _ = fit(model, rows, Uniform(), module=OFF, max_steps=1)
    assert relative(plain.gradients[0], without) < BOUND
    assert "train/router_loss" not in plain.logged[0]


GEOMETRIES = {
    "(4, 2)": {"micro_batch_size": 4},
    "(1, 8)": {"micro_batch_size": 1},
    "(3, 3) in order": {"micro_batch_size": 3, "grouping": "plain"},
    "packed": {"micro_batch_size": 2, "packing": True},
    "padding-free": {"micro_batch_size": 2, "packing": "padding_free"},
}
WEIGHTINGS = [Uniform(), Renormalized(DFT()), Median()]


@pytest.mark.parametrize("normalize", ["tokens", pytest.param("sequences", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_how_a_step_is_cut_up_changes_nothing(models, rows, weighting, normalize, tmp_path):
    """Divisors that are known from the data, and one that is a sum of weights; the shorter last step; validation."""
    validation = write_jsonl(tmp_path / "val.jsonl", sums(5, seed=7))

    def run(data):
        options = data | {"val_path": str(validation)}
        _, recorder, trainer = fit(
            models("mixtral"), rows, weighting, module={"normalize": normalize}, data=options, max_steps=4
        )
        return recorder, float(trainer.callback_metrics["val/router_loss"])

    full, validated = run({"micro_batch_size": 8})
    assert len(full.gradients) == 4
    chosen = (
        list(GEOMETRIES.values()) if weighting == Uniform() and normalize == "tokens" else [{"micro_batch_size": 3}]
    )
    for data in chosen:
        other, also = run(data)
        for ours, truth in zip(other.gradients, full.gradients, strict=True):
            assert relative(ours, truth) < BOUND
        for mine, theirs in zip(other.logged, full.logged, strict=True):
            assert mine["train/router_loss"] == pytest.approx(theirs["train/router_loss"], rel=2e-5)
        assert also == pytest.approx(validated, rel=2e-5)


@pytest.mark.parametrize("family", rare(FAMILIES, {"qwen2_moe"}))
def test_how_a_step_is_cut_up_changes_nothing_in_any_family(models, rows, family):
    """Where routing itself is not random."""
    if family == "phimoe":
        pytest.skip("routing is random in training: another micro-batch draws other experts")
    truth, ours = (
        fit(models(family), rows, Uniform(), data={"micro_batch_size": micro}, max_steps=1)[1].gradients[0]
        for micro in (8, 3)
    )
    assert relative(ours, truth) < BOUND


def test_the_pass_ahead_has_the_routing_of_the_gradient_pass(models, rows, monkeypatch):
    """Dropout and jitter included: what is counted ahead is what is then trained on."""
    seen = []
    record = RouterLoss.record

    def recorded(self, logits, batch):
        record(self, logits, batch)
        seen.append(self.peek())

    monkeypatch.setattr(RouterLoss, "record", recorded)
    model = models("mixtral", attention_dropout=0.5, router_jitter_noise=0.3)
    fit(model, rows, Uniform(), data={"micro_batch_size": 4}, max_steps=1)
    ahead, trained = seen[:2], seen[2:]
    assert len(seen) == 4
    for mine, theirs in zip(ahead, trained, strict=True):
        assert torch.equal(mine.chosen, theirs.chosen)
        assert torch.equal(mine.probability, theirs.probability)
        assert theirs.probability.requires_grad


def test_one_micro_batch_needs_no_pass_ahead(models, rows, monkeypatch):
    seen = []
    record = RouterLoss.record
    monkeypatch.setattr(RouterLoss, "record", lambda self, *given: (seen.append(1), record(self, *given)))
    fit(models("mixtral"), rows, Uniform(), max_steps=2)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(models, rows, kind):
    truth, ours = (
        fit(models("mixtral"), rows, Uniform(), module={"activation_checkpointing": each}, max_steps=1)[1].gradients[0]
        for each in ("none", kind)
    )
    assert torch.equal(ours, truth)


def test_adapters_get_the_gradient_of_transformers(models, rows):
    """Routers are frozen, and the loss reaches adapters by the hidden states."""
    lora = LoRA(rank=4)
    model = models("mixtral")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    truth = add_lora(load_model(ModelSource(str(model))), lora)
    module, recorder, _ = fit(model, rows, Uniform(), module={"lora": lora}, max_steps=0)
    truth.load_state_dict(module.network.model.state_dict())
    _, gradient = by_transformers(truth, first_batch(model, rows))
    _, recorder, _ = fit(model, rows, Uniform(), module={"lora": lora}, max_steps=1)
    _, plain, _ = fit(model, rows, Uniform(), module={"lora": lora} | OFF, max_steps=1)
    assert relative(recorder.gradients[0], gradient) < BOUND
    assert relative(plain.gradients[0], gradient) > 100 * BOUND


def test_validation_is_that_of_transformers(models, tmp_path):
    """Of the validation set as one batch."""
    validation = write_jsonl(tmp_path / "val.jsonl", sums(8))
    model = models("mixtral")
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    data = {"val_path": str(validation), "micro_batch_size": 3}
    _, _, trainer = fit(model, validation, DFT(), module=still, data=data, num_sanity_val_steps=1)
    network = load_model(ModelSource(str(model))).eval()
    with torch.no_grad():
        truth = network(**given_to_transformers(first_batch(model, validation)), use_cache=False).aux_loss
    assert float(trainer.callback_metrics["val/router_loss"]) == pytest.approx(float(truth), rel=1e-5)


@pytest.mark.parametrize(("router_loss", "is_there"), [("auto", True), ("none", False)])
def test_validating_outside_of_a_fit(models, rows, router_loss, is_there):
    """By `dft validate`: the router loss is a metric of the model, and nothing is refused that would not be trained."""
    import lightning.pytorch as pl

    from dft_lightning import FineTuner, NuminaMathDataModule

    module = FineTuner(str(models("mixtral")), DFT(), router_loss=router_loss)
    data = NuminaMathDataModule(str(rows), val_path=str(rows), global_batch_size=8, micro_batch_size=8, max_length=200)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, barebones=False)
    (found,) = trainer.validate(module, data, verbose=False)
    assert ("val/router_loss" in found) is is_there
    (found,) = trainer.validate(module, data, verbose=False)
    assert found.get("val/router_loss", 3.0) > 2.0


@dataclass(frozen=True)
class Nothing(TokenWeighting):
    """No token is worth anything."""

    divisor = "weights"

    def weights(self, tokens):
        return torch.zeros_like(tokens.logp)


@pytest.mark.parametrize("micro", [8, 3])
def test_a_step_that_counts_no_token_has_no_router_loss_either(models, rows, micro):
    """It is divided by zero, and trains nothing."""
    _, recorder, _ = fit(models("mixtral"), rows, Nothing(), data={"micro_batch_size": micro}, max_steps=1)
    assert not recorder.gradients[0].any()
    assert recorder.logged[0]["train/router_loss"] > 2.0


def test_a_step_whose_router_loss_is_not_finite_is_skipped(models, rows, monkeypatch):
    share = RouterLoss.share

    def broken(self, totals):
        added, value = share(self, totals)
        return added * torch.nan, value * torch.nan

    monkeypatch.setattr(RouterLoss, "share", broken)
    module, _, trainer = fit(models("mixtral"), rows, Uniform(), recorder=False, max_steps=1)
    assert float(trainer.callback_metrics["train/skipped_steps"]) == 1
    assert "train/router_loss" not in trainer.callback_metrics
    before = load_model(ModelSource(str(models("mixtral")))).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


class TestOption:
    def test_a_number_takes_the_place_of_the_configuration(self, models, rows):
        asked, own = models("mixtral"), models("mixtral", output_router_logits=False)
        _, truth, _ = fit(asked, rows, Uniform(), max_steps=1)
        _, ours, _ = fit(own, rows, Uniform(), module={"router_loss": COEFFICIENT}, max_steps=1)
        assert relative(ours.gradients[0], truth.gradients[0]) < 1e-6
        _, none, _ = fit(own, rows, Uniform(), max_steps=1)
        assert "train/router_loss" not in none.logged[0]
        _, twice, _ = fit(asked, rows, Uniform(), module={"router_loss": 2 * COEFFICIENT}, max_steps=1)
        term = truth.gradients[0] - none.gradients[0]
        assert relative(twice.gradients[0] - none.gradients[0], 2 * term) < 1e-3

    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_a_coefficient_that_is_none_is_refused(self, models, rows, value):
        with pytest.raises(UserError, match=r"model.router_loss is .*; expected auto, none, or a number of at least 0"):
            fit(models("mixtral"), rows, Uniform(), module={"router_loss": value})

    def test_a_model_without_routers(self, model_dir, rows):
        with pytest.raises(UserError, match=r"LlamaConfig has no output_router_logits.*--model.router_loss none"):
            fit(model_dir, rows, Uniform(), module={"router_loss": 0.01})
        for value in (0, "none"):
            fit(model_dir, rows, Uniform(), module={"router_loss": value}, max_steps=1)

    @pytest.mark.parametrize("family", rare([name for name in OTHERS if name != "doge"], {"deepseek_v2"}))
    def test_a_router_loss_that_transformers_lacks_or_has_otherwise(self, models, rows, family):
        with pytest.raises(UserError, match=r"router loss.*set --model.router_loss none"):
            fit(models(family), rows, Uniform())
        _, recorder, _ = fit(models(family), rows, Uniform(), module=OFF, max_steps=1)
        _, truth = by_transformers(
            load_model(ModelSource(str(models(family)))), first_batch(models(family), rows), output_router_logits=False
        )
        assert relative(recorder.gradients[0], truth) < BOUND

    def test_what_is_in_force_is_printed(self, models, rows, monkeypatch):
        from dft_lightning import loss_terms

        said = []
        monkeypatch.setattr(loss_terms, "rank_zero_info", said.append)
        fit(models("mixtral"), rows, Uniform(), max_steps=0)
        fit(models("mixtral"), rows, Uniform(), module={"router_loss": 0.5}, max_steps=0)
        fit(models("mixtral"), rows, Uniform(), module=OFF, max_steps=0)
        assert said[0].startswith("Router loss: coefficient 0.1 (the model's configuration), 2 experts per token")
        assert said[1].startswith("Router loss: coefficient 0.5 (model.router_loss), 2 experts per token")
        assert said[2] == "Router loss: none (model.router_loss none, output_router_logits True)"

    def test_another_run_than_the_checkpoint_of(self, models, rows, tmp_path):
        _, _, trainer = fit(models("mixtral"), rows, Uniform(), max_steps=1)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        with pytest.raises(UserError, match="router loss"):
            fit(models("mixtral"), rows, Uniform(), module=OFF, max_steps=2, ckpt_path=str(tmp_path / "one.ckpt"))

    def test_compiled_layers_are_refused(self, models, rows):
        with pytest.raises(UserError, match=r"--model.compile false, or --model.router_loss none"):
            fit(models("mixtral"), rows, Uniform(), module={"compile": True}, data={"packing": True})

    def test_batches_of_ones_own_cannot_be_accumulated(self, models, rows):
        """Nothing but a data module knows the step's other micro-batches."""
        import lightning.pytorch as pl

        from dft_lightning import FineTuner

        module = FineTuner(str(models("mixtral")), Uniform())
        loader = torch.utils.data.DataLoader([first_batch(models("mixtral"), rows)] * 2, batch_size=None)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=2, **quiet)
        with pytest.raises(UserError, match="needs all of them at the start of the step"):
            trainer.fit(module, loader)


def on_two_ranks(folder, strategy):
    """Called on each rank."""
    found = {}
    for name, weighting in (("uniform", Uniform()), ("weights", Renormalized(DFT())), ("step", Median())):
        for micro in (4, 1):
            data = {"micro_batch_size": micro, "val_path": str(folder / "val.jsonl"), "cache_dir": str(folder / "c")}
            _, recorder, trainer = fit(
                folder / "model", folder / "rows.jsonl", weighting, data=data, devices=2, strategy=strategy, max_steps=4
            )
            logged = [one["train/router_loss"] for one in recorder.logged]
            logged.append(float(trainer.callback_metrics["val/router_loss"]))
            found[f"{name} {micro}"] = {"gradients": recorder.gradients, "logged": logged}
    if trainer.is_global_zero:
        torch.save(found, folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks(tmp_path, strategy):
    routed_model(tmp_path / "model", "mixtral")
    write_jsonl(tmp_path / "rows.jsonl", sums(26))
    write_jsonl(tmp_path / "val.jsonl", sums(5, seed=7))
    start(2, __file__, "on_two_ranks", tmp_path, strategy)
    found = torch.load(tmp_path / "found.pt")
    for name, weighting in (("uniform", Uniform()), ("weights", Renormalized(DFT())), ("step", Median())):
        data = {"val_path": str(tmp_path / "val.jsonl")}
        _, alone, trainer = fit(tmp_path / "model", tmp_path / "rows.jsonl", weighting, data=data, max_steps=4)
        logged = [one["train/router_loss"] for one in alone.logged]
        logged.append(float(trainer.callback_metrics["val/router_loss"]))
        for micro in (4, 1):
            ours = found[f"{name} {micro}"]
            for mine, truth in zip(ours["gradients"], alone.gradients, strict=True):
                assert relative(mine, truth) < BOUND
            assert ours["logged"] == pytest.approx(logged, rel=2e-5)
