"""How long moving takes, and how much of it is hidden, against numbers by hand."""

import pytest

from dft_lightning.planning.scaling import MASTERS, Mesh, Weights
from dft_lightning.planning.traffic import (
    H200,
    Links,
    StepTime,
    Traffic,
    context_parallel,
    moved,
    moved_by_group,
    ring,
    step_time,
    tensor_parallel,
    tokens_to_hide,
)

PLAIN = Links(near=100.0, far=10.0, hop_near=0.0, hop_far=0.0, call=0.0)
WEIGHTS = Weights(layer=((1024, 64),), rest=((2048, 64),), layers=4)


class TestRing:
    def test_one_rank_moves_nothing(self):
        assert ring(1000.0, 1, 1) == Traffic()

    def test_within_a_node(self):
        assert ring(800.0, 8, 1) == Traffic(near=700.0, far=0.0, steps_near=7, steps_far=0, calls=1)

    def test_over_nodes(self):
        """Two nodes of eight: half of the buffer comes in over eight adapters."""
        assert ring(1600.0, 16, 2) == Traffic(1500 - 100, 100.0, steps_near=14, steps_far=1, calls=1)

    @pytest.mark.parametrize(("ranks", "nodes"), [(16, 2), (1024, 128), (8, 1), (8, 8)])
    def test_what_comes_is_what_was_not_there(self, ranks, nodes):
        assert ring(1.0, ranks, nodes).total == pytest.approx((ranks - 1) / ranks)


def test_seconds_are_those_of_the_slower_way_and_of_the_hops():
    links = Links(near=100.0, far=10.0, hop_near=1.0, hop_far=20.0, call=300.0)
    assert links.seconds(Traffic(near=500.0, far=10.0, steps_near=2, steps_far=1, calls=1)) == 5 + 2 + 20 + 300
    assert links.seconds(Traffic(near=500.0, far=90.0)) == 9
    assert links.seconds(Traffic()) == 0


def test_layers_are_gathered_twice_and_the_rest_once():
    layer, rest = 1024 * 64, 2048 * 64
    traffic = moved(WEIGHTS, Mesh(8), MASTERS, micro_batches=3)
    assert traffic.total == pytest.approx(3 * 7 / 8 * (4 * layer * (2 * 2 + 4) + rest * (2 + 4)))
    assert traffic.calls == 3 * (4 * 3 + 2)


def test_copies_add_up_in_every_micro_batch():
    one, three = (moved(WEIGHTS, Mesh(8, 4), MASTERS, count) for count in (1, 3))
    assert one.far == pytest.approx(2 * 3 / 4 * WEIGHTS.total / 8 * 4)
    assert three == one.times(3)


class TestStepTime:
    def test_by_hand(self):
        assert StepTime(computing=10.0, moving=4.0, alone=1.0).total == 11
        assert StepTime(computing=10.0, moving=31.0, alone=1.0).total == 31
        assert StepTime(computing=10.0, moving=41.0, alone=1.0).efficiency == pytest.approx(10 / 41)

    def test_what_is_around_the_layers_is_not_hidden(self):
        """Within the group, and between the copies."""
        group = PLAIN.seconds(moved_by_group(WEIGHTS.rest, Mesh(8, 4), MASTERS, gathers=1))
        between = 2 * 3 / 4 * 4 * 2048 * 64 / 8 / 10.0
        assert step_time(WEIGHTS, Mesh(8, 4), MASTERS, PLAIN, 1.0, 3).alone == pytest.approx(3 * (group + between))

    def test_one_device_only_computes(self):
        assert step_time(WEIGHTS, Mesh(1), MASTERS, H200, 7.0).total == 7


def test_enough_tokens_hide_the_layers():
    """Eight bytes a number over the adapters, six operations a number and token: the number of weights cancels."""
    big = Weights(layer=((8192, 65536),), rest=((8, 8),), layers=4)
    half = Weights(layer=((8192, 32768),), rest=((8, 8),), layers=4)
    flops = 0.4 * 989.4e12
    links = Links(H200.near, H200.far, 0.0, 0.0, 0.0)
    found = [
        tokens_to_hide(w, Mesh(128), MASTERS, links, 6 * 4 * w.layer[0][0] * w.layer[0][1] / flops) for w in (big, half)
    ]
    assert found[0] == pytest.approx(found[1])
    near = (127 / 128 - 15 / 16 / 8) / 350e9
    assert found[0] == pytest.approx(8 * max(near, 15 / 16 / 8 / 46e9) * flops / 6)
    assert tokens_to_hide(half, Mesh(1024), MASTERS, H200, 1e-6) > tokens_to_hide(
        half, Mesh(1024), MASTERS, links, 1e-6
    )


def test_splitting_layers_or_sequences():
    """By hand: 4 all-reduces of tokens × hidden, twice around; keys and values once forward and twice backward."""
    assert tensor_parallel(10, 6, 3, 2).total == 2 * 10 * 6 * 2 * 1 / 2 * 4 * 3
    assert context_parallel(10, 6, 3, 2, 1).total == 2 * 10 * 6 * 2 / 2 * 3 * 3
