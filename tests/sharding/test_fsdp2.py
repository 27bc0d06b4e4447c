"""One gradient on one process and on any number of ranks that share the weights; the bounds are those of exactness.py.

Weights differ by what gradients may differ, and by the rounding of each step: 2⁻²⁴ of a weight, once in each run.
"""

import cases
import pytest
import torch
from cases import CASES, COMPILED, HALF, HYBRID, KEPT
from exactness import GRADIENT, LOGGED, plain, relative, worst
from exactness import HALF as HALF_BOUND
from ranks import start
from transformers import AutoModelForCausalLM

from dft_lightning.weighting import DFT

pytestmark = pytest.mark.slow  # starts other processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharding")
    cases.prepare(made)
    return made


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of a case, once."""
    known = {}

    def found(name):
        if name not in known:
            known[name] = cases.outcome(folder, (CASES | HYBRID | HALF | COMPILED)[name])
        return known[name]

    return found


def on_ranks(folder, count, *arguments):
    start(count, cases.__file__, "run_all", folder, *arguments)
    return torch.load(folder / "sharded.pt")


@pytest.fixture(scope="module", params=[1, 2, 4])
def sharded(request, folder):
    """Every case on so many ranks."""
    found = on_ranks(folder, request.param)
    for outcome in found.values():
        outcome["ranks"] = request.param
    return found


def assert_alike(ours, truth):
    before, after, logged = worst(ours, truth)
    assert len(ours["before"]) == len(truth["before"]) > 0
    assert before < GRADIENT
    assert after < GRADIENT
    assert logged < LOGGED
    assert ours["weights"].keys() == truth["weights"].keys()
    rounding = len(truth["after"]) * 2 * 2**-24
    for name, weight in truth["weights"].items():
        moved = sum(float(gradient.norm()) for gradient in truth["after"]) * 0.01  # at most, by the harness's rate
        assert float((ours["weights"][name] - weight).norm()) <= rounding * float(weight.norm()) + GRADIENT * moved


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_the_weights_have_the_gradient_of_one_process(sharded, alone, name):
    assert_alike(sharded[name], alone(name))


def test_copies_of_shards(sharded, alone):
    for name in HYBRID.keys() & sharded.keys():
        assert_alike(sharded[name], alone(name))
        assert sharded[name]["held"] > 1.5 * sharded["untied"]["held"]


def test_each_rank_holds_its_part_alone(sharded):
    """Of each matrix; of a vector that the ranks cannot share evenly, the first hold one entry more."""
    share = sharded["untied"]["held"]
    assert share == pytest.approx(1 / sharded["untied"]["ranks"], rel=0.05)


def test_buffers_that_no_state_has_are_those_of_the_reader(sharded, alone):
    for name in ("untied", "soft-cap, tied"):
        truth = alone(name)["buffers"]
        assert truth
        assert sharded[name]["buffers"].keys() == truth.keys()
        assert all(torch.equal(sharded[name]["buffers"][key], value) for key, value in truth.items())


def test_how_to_generate_is_what_the_reader_read(sharded, alone):
    assert sharded["untied"]["generation"] == alone("untied")["generation"]
    assert sharded["untied"]["generation"]["temperature"] == 0.7


def test_a_frozen_copy_is_held_in_parts_between_micro_batches(sharded):
    """Embedding and head too: it has no backward pass that would let go of them."""
    for name in ("distributions of a frozen copy", "log-probabilities of a frozen copy"):
        (copy,), ranks = sharded[name]["copies"], sharded[name]["ranks"]
        whole = sum(value.numel() for value in sharded[name]["weights"].values())
        assert copy / whole == pytest.approx(1 / ranks, rel=0.05)


def test_the_reference_has_one_fingerprint_on_any_number_of_ranks(sharded, alone):
    for name in ("sequence weights of a cached reference", "distributions of a frozen copy"):
        assert sharded[name]["reference"] == alone(name)["reference"] is not None
    assert sharded["untied"]["fingerprint"] != sharded["tied"]["fingerprint"]


def test_computed_in_bfloat16_from_float32_weights(sharded, folder):
    """The yardstick is the plain computation with the weights rounded to bfloat16."""
    exact = plain(folder, DFT(), 8, "exact")
    allowed = max(relative(plain(folder, DFT(), micro, "bf16-true"), exact) for micro in (8, 2))
    (ours,) = sharded["computed in bfloat16"]["before"]
    assert 1e-4 < relative(ours, exact) <= HALF_BOUND * allowed
    kinds = {value.dtype for value in sharded["computed in bfloat16"]["weights"].values()}
    assert kinds == {torch.float32}


def test_statistics_and_what_is_brought_along_stay_in_float32(sharded):
    """Not only by their dtype: what had been rounded on its way would be so still."""
    found = sharded["computed in bfloat16, sequences"]
    assert found["statistics"] == {"torch.float32"}
    assert not found["rounded"] & {"logp", "ref_logp"}


@pytest.mark.parametrize("name", ["computed in bfloat16, logits too", "computed in bfloat16, reduced once a step"])
def test_other_ways_to_compute_in_bfloat16(sharded, folder, name):
    """The plain computation has such logits, too, and is the yardstick; gradients that wait do so in float32."""
    exact = plain(folder, DFT(), 8, "exact")
    allowed = max(relative(plain(folder, DFT(), micro, "bf16-true"), exact) for micro in (8, 2, 1))
    (ours,) = sharded[name]["before"]
    assert 1e-4 < relative(ours, exact) <= HALF_BOUND * allowed


@pytest.mark.parametrize("name", ["held in bfloat16", "held in bfloat16, logits too", "held in bfloat16, LoRA"])
def test_held_in_bfloat16(sharded, alone, folder, name):
    """Each gradient entry is rounded to 8 bits once more where ranks add up, and once where micro-batches do."""
    (ours,), (truth,) = sharded[name]["before"], alone(name)["before"]
    assert relative(ours, truth) <= 2**-8 * HALF_BOUND
    held = {torch.float32 if "lora_" in key else torch.bfloat16 for key in sharded[name]["weights"]}
    assert {value.dtype for value in sharded[name]["weights"].values()} == held


def test_compiled_layers(folder, alone):
    assert_alike(on_ranks(folder, 2, "compiled")["compiled"], alone("compiled"))


@pytest.fixture(scope="module")
def kept(folder):
    """Runs of one process and of two ranks that keep a checkpoint, and what goes on from the other's."""
    cases.run_and_go_on(folder, "alone")
    start(2, cases.__file__, "run_and_go_on", folder, "sharded", "alone")
    for name, case in KEPT.items():
        origin = folder / f"sharded {name}" / "checkpoints" / "middle.ckpt"
        found = torch.load(folder / f"alone {name}.pt")
        found["sharded"] = cases.outcome(folder, case, ckpt_path=str(origin))
        torch.save(found, folder / f"alone {name}.pt")
    return lambda who, name: torch.load(folder / f"{who} {name}.pt")


@pytest.mark.parametrize("name", KEPT)
class TestACheckpoint:
    def test_on_as_many_ranks_a_run_goes_on_to_the_bit(self, kept, name):
        found = kept("sharded", name)
        for which in ("weights", "buffers"):
            assert all(torch.equal(found["sharded"][which][key], value) for key, value in found["whole"][which].items())
        assert all(map(torch.equal, found["sharded"]["after"], found["whole"]["after"][2:]))

    @pytest.mark.parametrize(("who", "origin"), [("alone", "sharded"), ("sharded", "alone")])
    def test_it_is_one_file_that_any_strategy_goes_on_from(self, kept, name, who, origin):
        truth, ours = kept("alone", name)["whole"], kept(who, name)[origin]
        assert len(ours["before"]) == len(truth["before"]) - 2
        for mine, theirs in zip(ours["before"], truth["before"][2:], strict=True):
            assert relative(mine, theirs) < GRADIENT

    def test_the_exported_model_is_the_trained_one(self, kept, folder, name):
        weights = kept("sharded", name)["whole"]["weights"]
        lora = name == "LoRA"
        exported = AutoModelForCausalLM.from_pretrained(
            folder / f"sharded {name}" / ("export-merged" if lora else "export")
        )
        for key, value in exported.named_parameters():
            if not lora:
                assert torch.equal(weights[f"model.{key}"], value)
        if lora:
            truth = AutoModelForCausalLM.from_pretrained(folder / f"alone {name}" / "export-merged")
            for ours, theirs in zip(exported.parameters(), truth.parameters(), strict=True):
                assert relative(ours, theirs) < GRADIENT
