"""Weights of rows, messages and tokens, and the stop tokens: from the file to the batch."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer, write_jsonl

from dft_lightning import ChatDataModule
from dft_lightning.data.batch import Collator
from dft_lightning.data.rendering import ChatRenderer
from dft_lightning.errors import UserError


def user(text="q"):
    return {"role": "user", "content": text}


def answer(text="ab", **more):
    return {"role": "assistant", "content": text, **more}


def made(tmp_path, rows, **options):
    data = ChatDataModule(str(write_jsonl(tmp_path / "rows.jsonl", rows)), max_unusable_share=1.0, **options)
    data.tokenizer = tiny_tokenizer()
    data.prepare_data()
    data.setup("fit")
    return data


def learnt(data, row=0):
    """The weights of a row's supervised tokens."""
    item = data.train_rows[row]
    assert (item["weight"].dtype, item["stop"].dtype) == (np.float32, np.bool_)
    assert (item["weight"][~item["supervised"]] == 1).all()
    return item["weight"][item["supervised"]].tolist()


def batch_of(data):
    return Collator()([[data.train_rows[index]] for index in range(len(data.train_rows))])


TWO_TURNS = [user(), answer("ab"), user(), answer("abc")]  # 3 and 4 supervised tokens: each has its stop token


class TestWeights:
    def test_of_a_row(self, tmp_path):
        rows = [{"messages": TWO_TURNS, "worth": worth} for worth in (2, 0.25, 0)]
        data = made(tmp_path, rows, weight="worth")
        for row, weight in enumerate((2.0, 0.25, 0.0)):
            assert learnt(data, row) == [weight] * 7
        batch = batch_of(data)
        assert batch.data_weight.tolist() == [2.0] * 7 + [0.25] * 7 + [0.0] * 7
        assert batch.data_weight.dtype == torch.float32

    def test_of_a_token(self, tmp_path):
        weights = [0, 1, 2, 3, 0.5, 0.25, 4]
        data = made(tmp_path, [{"messages": TWO_TURNS, "worth": weights}], weight="worth")
        assert learnt(data) == weights
        assert batch_of(data).data_weight.tolist() == weights

    def test_of_a_message(self, tmp_path):
        chats = [
            [user(), answer("ab", weight=0), user(), answer("abc", weight=2.5)],
            [user(), answer("ab", weight=0), user(), answer("abc")],  # 1, as in OpenAI's format
            [{**user(), "weight": 7}, answer("ab"), user(), answer("abc", weight=None)],
        ]
        data = made(tmp_path, [{"messages": chat} for chat in chats])
        assert learnt(data, 0) == [0.0] * 3 + [2.5] * 4
        assert learnt(data, 1) == [0.0] * 3 + [1.0] * 4
        assert learnt(data, 2) == [1.0] * 7
        assert (data.train_rows.report.weighted, data.train_rows.report.unequal) == (2, True)
        assert "2 with weights of their own" in str(data.train_rows.report)
        ignored = made(tmp_path, [{"messages": chat} for chat in chats], message_weights=False)
        assert learnt(ignored, 0) == [1.0] * 7
        assert not ignored.train_rows.report.weighted

    def test_of_a_sharegpt_message(self, tmp_path):
        chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab", "weight": 3}]
        assert learnt(made(tmp_path, [{"messages": chat}])) == [3.0] * 3

    @pytest.mark.parametrize("worth", [3, [0, 1, 2, 3, 4, 5, 6]])
    def test_they_are_multiplied(self, tmp_path, worth):
        chat = [user(), answer("ab", weight=2), user(), answer("abc", weight=0.5)]
        data = made(tmp_path, [{"messages": chat, "worth": worth}], weight="worth")
        of_row = worth if isinstance(worth, list) else [worth] * 7
        assert learnt(data) == [a * b for a, b in zip([2.0] * 3 + [0.5] * 4, of_row, strict=True)]

    def test_they_are_truncated_with_their_tokens(self, tmp_path):
        rows = [{"messages": TWO_TURNS, "worth": [1, 2, 3, 4, 5, 6, 7]}]
        whole = made(tmp_path, rows, weight="worth").train_rows[0]
        cut = made(tmp_path, rows, weight="worth", max_length=len(whole["input_ids"]) - 2)
        assert learnt(cut) == [1, 2, 3, 4, 5]

    def test_a_first_token_that_is_learnt_has_a_weight_that_no_loss_sees(self):
        sequence = {"row": 0, "input_ids": [5, 6, 7], "supervised": [True] * 3, "weight": [1, 2, 3], "stop": [1, 0, 1]}
        batch = Collator()([[sequence]])
        assert (batch.data_weight.tolist(), batch.stop.tolist()) == ([2.0, 3.0], [False, True])

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({}, "the weight is missing or null"),
            ({"worth": None}, "the weight is missing or null"),
            ({"worth": -1}, "a row's weight is no number from 0 to 1e+18"),
            ({"worth": "2"}, "a row's weight is no number from 0 to 1e+18"),
            ({"worth": True}, "a row's weight is no number from 0 to 1e+18"),
            ({"worth": float("nan")}, "a row's weight is no number from 0 to 1e+18"),
            ({"worth": float("inf")}, "a row's weight is no number from 0 to 1e+18"),
            ({"worth": [1] * 6}, "another number of weights than of supervised tokens"),
            ({"worth": []}, "another number of weights than of supervised tokens"),
            ({"worth": [1] * 6 + [None]}, "a token's weight is no number from 0 to 1e+18"),
            ({"worth": 1, "messages": [user(), answer(weight="1")]}, "a message's weight is no number from 0 to 1e+18"),
        ],
        ids=str,
    )
    def test_what_is_no_weight_makes_the_row_unusable(self, tmp_path, row, reason):
        good = {"messages": TWO_TURNS, "worth": 1}
        data = made(tmp_path, [good, {"messages": TWO_TURNS} | row], weight="worth")
        assert data.train_rows.report.unusable == {reason: 1}
        assert len(data.train_rows) == 1

    def test_how_many_there_should_be_is_said(self, tmp_path):
        rows = [{"messages": TWO_TURNS, "worth": worth} for worth in (1, [1, 2])]
        (example,) = made(tmp_path, rows, weight="worth").train_rows.report.examples.values()
        assert example == ["rows.jsonl line 2: 2 weights, 7 supervised tokens (stop tokens are among them)"]

    def test_a_column_that_no_row_has(self, tmp_path):
        with pytest.raises(UserError, match=r"no row has the column 'worth' of data\.weight; there are 'messages'"):
            made(tmp_path, [{"messages": TWO_TURNS}], weight="worth")

    def test_the_key_changes_only_with_their_use(self, tmp_path):
        """It tells runs apart, so that of rows without weights must stay what it was."""
        rows = [{"messages": TWO_TURNS, "worth": 1}]
        plain, again = made(tmp_path, rows).train_rows, made(tmp_path, rows, num_samples=1).train_rows
        weighted, ignored = (
            made(tmp_path, rows, **o).train_rows for o in ({"weight": "worth"}, {"message_weights": False})
        )
        assert plain.fingerprint == again.fingerprint
        assert len({plain.fingerprint, weighted.fingerprint, ignored.fingerprint}) == 3
        assert plain.content_hash([0]) == weighted.content_hash([0])  # the reference's log-probabilities are the same

    def test_other_processes_have_them(self, tmp_path):
        data = made(tmp_path, [{"messages": TWO_TURNS, "worth": 3}], weight="worth")
        sent = pickle.loads(pickle.dumps(data.train_rows))
        assert sent[0]["weight"].tolist() == data.train_rows[0]["weight"].tolist()


class TestStopTokens:
    def test_every_turn_has_one(self, tmp_path):
        data = made(tmp_path, [{"messages": TWO_TURNS}])
        item, stop = data.train_rows[0], tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
        assert item["stop"].sum() == 2
        assert (item["input_ids"][item["stop"]] == stop).all()
        assert item["supervised"][item["stop"]].all()
        batch = batch_of(data)
        assert batch.stop.tolist() == [False, False, True, False, False, False, True]
        assert batch.stop.dtype == torch.bool

    def test_a_truncated_turn_has_none(self, tmp_path):
        length = len(made(tmp_path, [{"messages": TWO_TURNS}]).train_rows[0]["input_ids"])
        data = made(tmp_path, [{"messages": TWO_TURNS}], max_length=length - 1)
        assert batch_of(data).stop.tolist() == [False, False, True, False, False, False]

    def test_a_stop_token_that_is_spelt_out_is_none(self, tmp_path):
        data = made(tmp_path, [{"messages": [user(), answer("a<|im_end|>b")]}])
        stops = batch_of(data).stop
        assert stops.sum() == 1
        assert stops[-1]

    def test_answers_that_follow_each_other_are_told_apart(self):
        """No run of supervised tokens has to end between them."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
            "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        )
        rendered = ChatRenderer(tokenizer).render([user(), answer("ab"), answer("c")])
        assert rendered.supervised == [False, True, True, True, True, True]
        assert rendered.ends == [3, 5]

    def test_the_eos_of_the_papers_recipe_is_one(self, tmp_path):
        data = made(tmp_path, [{"messages": [user(), answer()]}], end_of_response="eos")
        assert batch_of(data).stop.tolist() == [False, False, True]

    def test_a_template_that_changes_the_order_of_the_answers_is_refused(self):
        tokenizer = tiny_tokenizer()
        reordered = "messages if messages | length < 4 else messages | reverse | list"
        tokenizer.chat_template = tokenizer.chat_template.replace("in messages", f"in ({reordered})")
        with pytest.raises(UserError, match="changes the order of the answers"):
            ChatRenderer(tokenizer)


def test_a_batch_moves_with_them(tmp_path):
    data = made(tmp_path, [{"messages": TWO_TURNS, "worth": 3}], weight="worth")
    moved = batch_of(data).to("cpu")
    assert (moved.stop.sum(), moved.data_weight.sum()) == (2, 21)
    empty = Collator()([])
    assert (empty.stop.dtype, empty.data_weight.dtype, len(empty.stop)) == (torch.bool, torch.float32, 0)


def test_rows_without_marks_have_weight_1_and_no_stop():
    batch = Collator()([[{"row": 0, "input_ids": [5, 6, 7], "supervised": [False, True, True]}]])
    assert (batch.data_weight.tolist(), batch.stop.tolist()) == ([1.0, 1.0], [False, False])


def test_parquet_where_every_message_has_the_field(tmp_path):
    """Arrow gives a field to all messages of a column, null where there is nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [user(), answer("ab", weight=0.5), user(), answer("abc")]
    pq.write_table(pa.Table.from_pylist([{"messages": chat}]), tmp_path / "rows.parquet")
    assert json.dumps(pq.read_table(tmp_path / "rows.parquet").to_pylist()).count("null") == 3
    data = ChatDataModule(str(tmp_path / "rows.parquet"))
    data.tokenizer = tiny_tokenizer()
    data.prepare_data()
    data.setup("fit")
    assert learnt(data) == [0.5] * 3 + [1.0] * 4
