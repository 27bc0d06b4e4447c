"""The collator against ids written out by hand: the shift, the mask, padding, borders."""

import numpy as np
import pytest
import torch

from dft_lightning.data.batch import Collator


def row(number, ids, supervised):
    return {"row": number, "input_ids": np.array(ids), "supervised": np.array(supervised, dtype=bool)}


def test_labels_are_shifted_once_and_masked():
    batch = Collator(pad_id=9)([[row(7, [5, 6, 7, 8], [0, 0, 1, 1])], [row(3, [5, 6], [0, 1])]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert batch.supervised.tolist() == [1, 2, 4]  # the positions before 7, before 8, and before 6
    assert batch.target.tolist() == [7, 8, 6]
    assert batch.sequence.tolist() == [0, 0, 1]
    assert batch.position.tolist() == [0, 1, 0]
    assert batch.row.tolist() == [7, 3]
    assert batch.counts == [2, 1]
    assert batch.tokens == 6
    assert len(batch) == 2


def test_a_first_token_has_no_predecessor_to_learn_from():
    """Traps 9 and 19: it neither counts nor reaches back into the row before."""
    batch = Collator()([[row(0, [5, 6], [1, 1])], [row(1, [7, 8], [1, 0])]])
    assert batch.target.tolist() == [6]
    assert batch.supervised.tolist() == [0]


def test_padding_with_the_stop_token_does_not_mask_the_real_one():
    """Trap 20."""
    batch = Collator(pad_id=2)([[row(0, [5, 6, 2], [0, 1, 1])], [row(1, [5, 2], [0, 1])]])
    assert batch.target.tolist() == [6, 2, 2]


A, B, C = row(7, [5, 6, 7], [0, 1, 1]), row(3, [2, 8], [1, 1]), row(4, [6, 5, 4], [0, 0, 1])


def test_packed_rows_in_ids_written_out():
    """Traps 9 and 19: borders come from lengths, positions restart, and a first token is no label of the one before."""
    batch = Collator(pad_id=9, packed=True, width=6)([[A, B], [C]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 9], [6, 5, 4, 9, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 9, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.longest == 3
    assert batch.supervised.tolist() == [0, 1, 3, 7]
    assert batch.target.tolist() == [6, 7, 8, 4]
    assert batch.sequence.tolist() == [0, 0, 1, 2]
    assert batch.position.tolist() == [0, 1, 0, 0]
    assert batch.row.tolist() == [7, 3, 4]
    assert batch.tokens == 8


def test_padding_free_rows_have_none():
    batch = Collator(packed=True)([[A, B, C]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 6, 5, 4]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_an_empty_packed_batch_is_one_document_of_padding():
    batch = Collator(pad_id=4, packed=True, width=6)([])
    assert (batch.input_ids.tolist(), batch.position_ids.tolist()) == ([[4]], [[0]])
    assert (batch.cu_seqlens.tolist(), batch.longest, len(batch)) == ([0, 1], 1, 0)


def test_positions_of_padding_stay_within_those_of_the_sequences():
    """A model with a table of positions needs room for the longest sequence alone."""
    batch = Collator(packed=True, width=9)([[B, B]])
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1, 0]]
    empty = Collator(packed=True, width=5, fixed=(1, 3))([])
    assert empty.position_ids.tolist() == [[0] * 5]


def test_a_full_row_has_no_padding_document():
    assert Collator(packed=True, width=5)([[A, B]]).cu_seqlens.tolist() == [0, 3, 5]


def test_nothing_at_all():
    batch = Collator(pad_id=4)([])
    assert batch.input_ids.tolist() == [[4]]
    assert len(batch.target) == len(batch.supervised) == len(batch.row) == batch.tokens == 0
    assert batch.target.dtype == torch.long


def test_reference_values_follow_their_rows():
    reference = {4: np.array([-1.0, -2.0], np.float32), 9: np.array([-3.0], np.float32)}
    rows = [[row(9, [5, 6], [0, 1])], [row(4, [5, 6, 7], [0, 1, 1])]]
    batch = Collator(references={"train": reference})(rows)
    assert batch.ref_logp.tolist() == [-3.0, -1.0, -2.0]
    assert Collator(references={"train": reference})([]).ref_logp.dtype == torch.float32
    with pytest.raises(KeyError):
        Collator(references={"train": reference})([[row(1, [5, 6], [0, 1])]])


def test_moving_keeps_everything():
    batch = Collator(references={"train": {0: np.array([-1.0], np.float32)}})([[row(0, [5, 6], [0, 1])]])
    moved = batch.to("cpu")
    assert vars(moved).keys() == vars(batch).keys()
    assert moved.tokens == 2
    assert moved.ref_logp.dtype == torch.float32


def test_without_more_rows_are_padded_with_0_and_say_nothing_of_documents():
    batch = Collator()([[A], [B]])
    assert batch.input_ids.tolist() == [[5, 6, 7], [2, 8, 0]]
    assert (batch.longest, batch.cu_seqlens, batch.position_ids) == (0, None, None)
    assert batch.filled == [3, 2]


@pytest.mark.parametrize("rows", [[], [[C]], [[A, B]], [[A, B], [C]], [[C], [A], [B]]], ids=len)
@pytest.mark.parametrize("width", [5, 6, 9])
def test_batches_of_one_shape(rows, width):
    """Whatever is in them, the tensors that the model reads have one shape; documents that there are not are empty."""
    batch = Collator(pad_id=9, packed=True, width=width, fixed=(3, 7))(rows)
    assert batch.input_ids.shape == batch.position_ids.shape == (3, width)
    assert (len(batch.cu_seqlens), batch.longest) == (8, width)
    lengths = [[len(sequence["input_ids"]) for sequence in row] for row in rows]
    assert batch.filled == [sum(row) for row in lengths] + [0] * (3 - len(rows))
    ends = [0]
    for row in lengths + [[]] * (3 - len(rows)):
        for size in (*row, width - sum(row)):
            ends += [ends[-1] + size] * (size > 0)
    assert batch.cu_seqlens.tolist() == ends + [3 * width] * (8 - len(ends))
    assert (batch.input_ids != 9).sum() == sum(map(sum, lengths))


def test_a_batch_of_no_rows_is_as_wide_as_the_others_only_where_all_have_one_shape():
    assert Collator(width=6)([]).input_ids.shape == (1, 1)
    assert Collator(packed=True, width=6, fixed=(2, 3))([]).input_ids.shape == (2, 6)
