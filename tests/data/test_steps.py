"""A step's set of sequences depends on nothing but seed, epoch and global batch size."""

import numpy as np
import pytest

from dft_lightning.data.packing import Packed, Padded
from dft_lightning.data.steps import Geometry, StepSampler

LENGTHS = np.random.default_rng(0).integers(5, 500, 26)


def steps(micro, ranks=1, **options):
    """The set of rows of each step, over all ranks, and the micro-batches of each rank."""
    options = {"seed": 3, **options}
    samplers = [StepSampler(LENGTHS, Geometry(8, micro, ranks, rank), **options) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert all(len(got) == len(sampler) for got, sampler in zip(batches, samplers, strict=True))
    each = samplers[0].micro_batches
    sets = [
        sorted(one for rank in batches for batch in rank[number : number + each] for row in batch for one in row)
        for number in range(0, len(batches[0]), each)
    ]
    return sets, batches


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (4, 1), (3, 1), (1, 1), (4, 2), (3, 2), (16, 2), (1, 3)])
@pytest.mark.parametrize(
    "layout", [Padded(), Padded("plain"), Packed(500), Packed(800), Packed(2000, fill=False)], ids=repr
)
def test_the_geometry_lays_out_the_same_steps(micro, ranks, layout):
    expected, _ = steps(8)
    got, batches = steps(micro, ranks, layout=layout)
    assert got == expected
    assert sorted(row for step in got for row in step) == list(range(26))
    assert all(len(batch) <= micro for rank in batches for batch in rank)
    assert len({len(rank) for rank in batches}) == 1  # ranks never wait for one that has more


def test_the_last_smaller_step_has_as_many_micro_batches_as_the_others():
    """Trap 3: Lightning divides by the same accumulation in every window."""
    _, (batches,) = steps(2)
    assert len(batches) == 4 * 4
    assert [len(batch) for batch in batches[-4:]] == [2, 0, 0, 0]
    assert len(steps(2, drop_last=True)[0]) == 3


def test_similar_lengths_meet_and_the_longest_come_first():
    _, (batches,) = steps(2)
    first = [LENGTHS[row] for batch in batches[:4] for (row,) in batch]
    assert first == sorted(first, reverse=True)


def test_epochs_differ_and_repeat_by_seed():
    sampler = StepSampler(LENGTHS, Geometry(8, 8), seed=3)
    first = list(sampler)
    sampler.sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(StepSampler(LENGTHS, Geometry(8, 8), seed=4)) != first
    in_order = list(StepSampler(LENGTHS, Geometry(8, 8), layout=Padded("plain")))
    assert [one for batch in in_order for row in batch for one in row] == list(range(26))


@pytest.mark.parametrize("layout", [Padded(), Packed(700)], ids=repr)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 7, 15])
def test_starting_later_gives_the_rest(start, layout):
    options = {"seed": 3, "epoch": 1, "epochs": 2, "layout": layout}
    whole = list(StepSampler(LENGTHS, Geometry(8, 2), **options))
    sampler = StepSampler(LENGTHS, Geometry(8, 2), **options, start=start)
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole  # the next epoch is whole again


def test_sequences_of_steps_are_those_that_the_steps_read():
    sampler = StepSampler(LENGTHS, Geometry(8, 2), seed=3)
    for count in (0, 1, 3, 4, 6):
        read = set()
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            taken = max(0, min(count - 4 * epoch, 4)) * sampler.micro_batches
            read |= {one for batch in batches[:taken] for row in batch for one in row}
        assert sampler.sequences_of_steps(count).tolist() == sorted(read)


def test_packed_steps_have_as_many_micro_batches_as_the_fullest_of_the_run():
    """Known before the training: Lightning divides by one number in every window."""
    sampler = StepSampler(LENGTHS, Geometry(8, 2), seed=3, layout=Packed(500), epochs=3)
    needed = [-(-len(sampler.rows(epoch, number)) // 2) for epoch in range(3) for number in range(4)]
    assert min(needed) < max(needed) == sampler.micro_batches
    for epoch in range(3):
        for number in range(4):
            dealt = sampler.step(epoch, number)
            assert len(dealt) == sampler.micro_batches
            assert [row for batch in dealt for row in batch] == sampler.rows(epoch, number)


def test_the_share_of_used_positions_is_that_of_the_batches():
    for layout in (Padded(), Padded("plain"), Packed(500), Packed(1000, fill=False)):
        sampler = StepSampler(LENGTHS, Geometry(8, 3), seed=3, layout=layout)
        positions = 0
        for batch in sampler:
            width = max((int(LENGTHS[row].sum()) for row in batch), default=0)
            positions += len(batch) * (500 if layout == Packed(500) else width)
        assert sampler.share_used() == pytest.approx(LENGTHS.sum() / positions)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_the_height_of_batches_of_one_shape_is_that_of_the_fullest(micro, ranks):
    """No micro-batch of the run has more rows, and one has as many."""
    lengths = np.random.default_rng(0).integers(3, 40, 57)
    given = [
        StepSampler(lengths, Geometry(16, micro, ranks, rank), seed=1, layout=Packed(64), epochs=2)
        for rank in range(ranks)
    ]
    rows = [
        len(part)
        for one in given
        for epoch in range(2)
        for number in range(one.steps)
        for part in one.step(epoch, number)
    ]
    assert {one.height for one in given} == {max(rows)}
    assert max(rows) <= micro


def test_the_share_of_used_positions_of_batches_of_one_shape():
    """Every micro-batch of every rank has as many rows as the fullest, empty ones too."""
    for ranks, micro in ((1, 3), (2, 2), (3, 1)):
        sampler = StepSampler(LENGTHS, Geometry(8, micro, ranks), seed=3, layout=Packed(500), epochs=2)
        positions = sampler.steps * sampler.micro_batches * ranks * sampler.height * 500
        for epoch in range(2):
            assert sampler.share_used(epoch, fixed=True) == pytest.approx(LENGTHS.sum() / positions)


def test_without_more_a_sampler_is_of_the_first_epoch_and_of_one():
    seed = next(
        seed
        for seed in range(100)
        if StepSampler(LENGTHS, Geometry(8, 2), seed, Packed(500)).micro_batches
        < StepSampler(LENGTHS, Geometry(8, 2), seed, Packed(500), epochs=2).micro_batches
    )
    sampler = StepSampler(LENGTHS, Geometry(8, 2), seed, Packed(500))
    assert (sampler.epoch, sampler.epochs, sampler.start, sampler.drop_last) == (0, 1, 0, False)
    assert len(list(sampler)) == sampler.steps * sampler.micro_batches
    assert list(sampler) == [part for number in range(sampler.steps) for part in sampler.step(0, number)]
    free = [
        StepSampler(LENGTHS, Geometry(8, 2), seed, Padded("plain")).share_used(*epoch) for epoch in ((), (0,), (1,))
    ]
    assert free[0] == free[1] != free[2]


def test_the_permutation_of_an_epoch_is_drawn_once():
    sampler = StepSampler(LENGTHS, Geometry(8, 2), seed=3)
    assert sampler.order(4) is sampler.order(4)
    assert sampler.order(5).tolist() != sampler.order(4).tolist()


def test_what_a_sampler_has_without_any_sequence():
    for layout in (Padded(), Packed(500)):
        sampler = StepSampler(np.zeros(0, np.int64), Geometry(8, 2), seed=3, layout=layout)
        assert (sampler.steps, sampler.micro_batches, sampler.height, sampler.fullest) == (0, 1, 1, 1)
        assert list(sampler) == []
        assert sampler.share_used() == sampler.share_used(fixed=True) == 0.0
        assert sampler.sequences_of_steps(3).tolist() == []


def test_the_fullest_row():
    sampler = StepSampler(LENGTHS, Geometry(8, 2), seed=3, layout=Packed(800))
    rows = [row for number in range(sampler.steps) for row in sampler.rows(0, number)]
    assert sampler.fullest == max(map(len, rows)) > 1
    assert StepSampler(LENGTHS, Geometry(8, 2), seed=3).fullest == 1
