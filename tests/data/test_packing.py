"""Best-fit decreasing: whole sequences, never too many, few rows; on the real rows at least 97 % of the positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dft_lightning.data import NuminaMathDataModule
from dft_lightning.data.packing import Packed, best_fit_decreasing
from dft_lightning.loading import ModelSource, load_tokenizer


def test_by_hand():
    """6 and 4 fill the first row, 5 and 5 the second; 3 opens a third, into which 2 fits best."""
    assert best_fit_decreasing(np.array([6, 5, 5, 4, 3, 2]), 10) == [[0, 3], [1, 2], [4, 5]]


def test_each_goes_where_it_leaves_the_least_room():
    assert best_fit_decreasing(np.array([7, 6, 3]), 10) == [[0, 2], [1]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=200, deadline=None)
def test_the_bins_are_those_of_a_plain_search(lengths, capacity):
    """The definition, looking through all bins each time: the least room that is enough, of several the first bin."""
    bins, room = [], []
    for index, length in enumerate(sorted(lengths, reverse=True)):
        enough = [(left, number) for number, left in enumerate(room) if left >= length]
        number = min(enough)[1] if enough else len(bins)
        if not enough:
            bins.append([])
            room.append(capacity)
        bins[number].append(index)
        room[number] -= length
    assert best_fit_decreasing(np.array(sorted(lengths, reverse=True), dtype=int), capacity) == bins


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=200, deadline=None)
def test_every_sequence_is_in_one_row_and_no_row_overflows(lengths, capacity):
    sequences, sizes = np.arange(len(lengths)) + 100, np.array(lengths, dtype=int)
    rows = Packed(capacity).rows(sequences, sizes)
    assert sorted(one for row in rows for one in row) == sequences.tolist()
    filled = [sum(lengths[one - 100] for one in row) for row in rows]
    assert all(size <= capacity for size in filled)
    assert filled == sorted(filled, reverse=True)
    assert sum(size <= capacity / 2 for size in filled) <= 1  # two of them would be one row
    assert rows == Packed(capacity).rows(sequences, sizes)


def test_a_sequence_longer_than_a_row_is_our_own_mistake():
    with pytest.raises(AssertionError, match="11 tokens in rows of 10"):
        best_fit_decreasing(np.array([11]), 10)


def test_the_real_rows_fill_97_per_cent(shared, embedded_model_dir, tmp_path):
    """The promise for steps of 256 sequences on one rank."""
    rows = shared / "data" / "numina_schema" / "train.parquet"
    data = NuminaMathDataModule(str(rows), packing=True, max_length=2048, cache_dir=str(tmp_path))
    data.tokenizer = load_tokenizer(ModelSource(str(embedded_model_dir)))
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_rows) > 1000
    assert data.sampler().share_used() >= 0.97
    assert data.sampler().geometry.global_batch_size == 256
