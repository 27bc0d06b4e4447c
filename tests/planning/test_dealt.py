"""What a device holds and gets of a model that is dealt out, against torch's own sharding and the plan on paper."""

from argparse import Namespace

import pytest
import torch
from conftest import tiny_config
from test_memory import load

from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.planning import scaling, traffic
from dft_lightning.planning.dealt import Dealing, strategy_of
from dft_lightning.planning.live_bytes import nbytes
from dft_lightning.planning.memory import memory
from dft_lightning.planning.rehearsal import MicroBatch

UNEVEN = tiny_config(num_hidden_layers=3, intermediate_size=50)
KNOWN = [(scaling.MASTERS, torch.float32, torch.bfloat16), (scaling.PURE, torch.bfloat16, None)]


@pytest.mark.parametrize(("precision", "dtype", "compute"), KNOWN, ids=["masters", "pure"])
@pytest.mark.parametrize(("shards", "copies"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_it_is_the_arithmetic_of_scaling(precision, dtype, compute, shards, copies):
    """That is proved on real ranks: test_scaling.py."""
    given = load(config=UNEVEN, dtype=dtype, dealing=Dealing(shards, copies, compute))
    network, weights, mesh = given.network(), scaling.weights_of(UNEVEN), scaling.Mesh(shards, copies)
    paper = scaling.memory(weights, mesh, precision, activations=0)
    assert given.dealing.whole(network) == paper.whole
    need = memory(given, "none")
    moments = need.held["optimizer states"]
    assert need.held["weights"] + need.gradients + moments == pytest.approx(paper.states, rel=1e-2)  # and counters
    assert need.held["weights"] == need.gradients == scaling.held(shapes(weights), shards) * dtype.itemsize
    assert given.dealing.moved(network) == pytest.approx(traffic.moved(weights, mesh, precision).total)


def shapes(weights):
    return [*weights.layer * weights.layers, *weights.rest]


class TestMemory:
    def test_gathered_in_place_of_buckets(self):
        need = memory(load(ranks=4, dealing=Dealing(4)), "none")
        assert "buckets of DistributedDataParallel" not in need.held
        assert need.held["gathered weights and their gradients"] > 0

    def test_of_adapters_the_gradients_are_small(self):
        adapted, full = (load(lora=lora, dealing=Dealing(2)) for lora in (LoRA(rank=2), None))
        rest = 4 * 2 * 320 * 32 + 4 * 32  # embedding, head and norm, of which no gradient is made
        assert rest < adapted.dealing.whole(adapted.network()) < full.dealing.whole(full.network()) / 1.5
        assert memory(adapted, "none").gradients < memory(full, "none").gradients / 5

    def test_a_frozen_copy_is_dealt_too_and_gathered_beside(self):
        plain, compared = (memory(load(dealing=Dealing(4), compared=value), "none") for value in (False, True))
        assert compared.held["frozen copy of the initial model"] == plain.held["weights"]
        assert compared.held["gathered weights of the copy"] == 4 * (2 * 320 * 32 + 32)
        beside = {"frozen copy of the initial model", "gathered weights of the copy"}
        assert compared.held.keys() - plain.held.keys() == beside

    def test_what_is_computed_in_bfloat16_is_saved_in_it(self):
        shape = MicroBatch.full(4, 64)
        masters, pure = (
            memory(load(shape=shape, dealing=Dealing(2, 1, torch.bfloat16), dtype=dtype, precision=precision), "none")
            for dtype, precision in ((torch.float32, "32-true"), (torch.bfloat16, "bf16-true"))
        )
        assert masters.micro_batch == pure.micro_batch
        assert masters.held["weights"] == 2 * pure.held["weights"]

    def test_gradients_stay_between_micro_batches_in_parts(self):
        """Whether a step has one micro-batch or several: what comes is summed over ranks before the next layer."""
        one, several = (memory(load(dealing=Dealing(2), accumulates=value), "none") for value in (False, True))
        assert one == several
        assert one.gradients < nbytes(load().network().parameters())


def test_gradients_that_are_summed_once_a_step_wait_whole():
    network = load().network()
    each, once = (Dealing(4, 2, torch.bfloat16, value) for value in (False, True))
    paper = [traffic.moved(scaling.weights_of(load().config), scaling.Mesh(4, 2), scaling.MASTERS, n) for n in (1, 3)]
    assert each.moved(network, 3) == pytest.approx(paper[1].total)
    assert once.moved(network) == each.moved(network)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    summed = (3 / 4 + 2 * 1 / 2 / 4) * 4 * numbers
    assert each.moved(network, 3) - once.moved(network, 3) == pytest.approx(2 * summed)
    needs = [memory(load(dealing=dealing, dtype=torch.float32), "none") for dealing in (each, once)]
    assert sum(needs[1].held.values()) - sum(needs[0].held.values()) == 4 * numbers
    assert memory(load(dealing=once, accumulates=False), "none") == memory(load(dealing=each), "none")


class TestStrategies:
    @pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "single_device"])
    def test_each_rank_has_all(self, name):
        assert strategy_of(name, "32-true") is None

    def test_by_name_all_ranks_share(self):
        assert Dealing.by(strategy_of("fsdp2", "32-true"), 8) == Dealing(8)

    def test_by_options(self):
        path = "dft_lightning.sharding.FSDP2Strategy"
        options = {"replicate": 2, "compute": "bfloat16", "reduce": "step", "timeout": "0:30:00"}
        given = Namespace(class_path=path, init_args=options)
        assert Dealing.by(strategy_of(given, "32-true"), 8) == Dealing(4, 2, torch.bfloat16, True)
        with pytest.raises(UserError, match="leave compute out"):
            strategy_of(given, "bf16-mixed")
        with pytest.raises(UserError, match="the run has 7"):
            Dealing.by(strategy_of(given, "32-true"), 7)

    def test_others_are_not_known(self):
        with pytest.raises(UserError, match="auto, ddp and fsdp2, not 'deepspeed'"):
            strategy_of("deepspeed", "32-true")
