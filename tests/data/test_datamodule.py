"""The data modules: which rows, which refusals, what becomes of a row, and where a resumed run goes on."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sums, tiny_tokenizer, write_jsonl
from harness import fit

from dft_lightning import ChatDataModule, NuminaMathDataModule
from dft_lightning.data.practice import PracticeDataModule
from dft_lightning.data.steps import Geometry
from dft_lightning.errors import UserError


def made(path, kind=ChatDataModule, **options):
    """A data module that is set up, without a trainer."""
    data = kind(str(path), **options)
    data.tokenizer = tiny_tokenizer()
    data.prepare_data()
    data.setup("fit")
    return data


def text(data, row=0, learnt=False):
    """The text of a training row, or of what is learnt of it."""
    item = data.train_rows[row]
    return tiny_tokenizer().decode(item["input_ids"][item["supervised"]] if learnt else item["input_ids"])


class TestSplit:
    def split(self, count=100, **options):
        train, val = ChatDataModule("x", **options).split_rows(count)
        assert not set(train) & set(val)
        for part in (train, val):
            assert part.tolist() == sorted(part)
        return train, val

    @pytest.mark.parametrize("subset", ["random", "first"])
    @pytest.mark.parametrize(
        ("options", "train", "val"),
        [
            ({}, 100, 0),
            ({"val_size": 10}, 90, 10),
            ({"val_size": 0.25}, 75, 25),
            ({"val_size": 1}, 99, 1),
            ({"val_size": 0.001}, 99, 1),  # asked for, so there is one
            ({"num_samples": 30}, 30, 0),
            ({"num_samples": 30, "val_size": 10}, 30, 10),
            ({"num_samples": 95, "val_size": 10}, 90, 10),
            ({"num_samples": 999}, 100, 0),
            ({"val_path": "other", "val_size": 10}, 100, 0),
        ],
        ids=str,
    )
    def test_counts(self, subset, options, train, val):
        got = self.split(subset=subset, **options)
        assert tuple(map(len, got)) == (train, val)

    def test_the_first_are_the_first_and_the_last_validate(self):
        train, val = self.split(subset="first", num_samples=7, val_size=3)
        assert (train.tolist(), val.tolist()) == ([*range(7)], [97, 98, 99])

    def test_random_ones_are_by_seed(self):
        first, again, other = (self.split(num_samples=20, val_size=5, seed=seed) for seed in (1, 1, 2))
        for one, same, different in zip(first, again, other, strict=True):
            assert one.tolist() == same.tolist() != different.tolist()
        assert first[0].tolist() != [*range(20)]

    def test_the_training_rows_do_not_hang_on_the_validation_size(self):
        assert self.split(num_samples=20)[0].tolist() == self.split(num_samples=20, val_size=30)[0].tolist()

    @pytest.mark.parametrize("size", [100, 500, 0.999])
    def test_nothing_left_to_train_on(self, size):
        with pytest.raises(UserError, match=r"val_size .* leaves nothing to train on: there are 100 rows"):
            self.split(val_size=size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either data.path .* or data.dataset"),
        ({"path": "x", "dataset": "y"}, "either data.path .* or data.dataset"),
        ({"path": "x", "global_batch_size": 0}, "data.global_batch_size is 0; expected 1 or more"),
        ({"path": "x", "micro_batch_size": -1}, "data.micro_batch_size is -1"),
        ({"path": "x", "max_length": 0}, "data.max_length is 0"),
        ({"path": "x", "num_samples": 0}, "data.num_samples is 0; expected 1 or more, or null"),
        ({"path": "x", "val_size": -0.1}, "data.val_size is -0.1"),
        ({"path": "x", "prompt": "problem"}, "both data.prompt and data.completion"),
    ],
    ids=str,
)
def test_refused_before_anything_is_read(options, message):
    with pytest.raises(UserError, match=message):
        ChatDataModule(**options)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("micro", "count"), [(4, 26), (4, 5), (1, 26), (99, 26), (4, 1)])
def test_scoring_has_every_row_once_on_any_ranks(rows_file, monkeypatch, ranks, micro, count):
    data = made(rows_file, micro_batch_size=micro, num_samples=count)
    each = []
    for rank in range(ranks):
        monkeypatch.setattr(data, "geometry", lambda rank=rank: Geometry(8, micro, ranks, rank))
        each.append([batch.row.tolist() for batch in data.predict_dataloader()])
    assert sorted(row for batches in each for batch in batches for row in batch) == [*range(count)]
    assert len({len(batches) for batches in each}) == 1  # no rank waits for another
    assert max(len(batch) for batches in each for batch in batches) <= micro


def test_looking_at_the_data_draws_no_random_numbers(rows_file):
    """Dropout would depend on whether and when a run validates."""
    data = made(rows_file, val_size=4, global_batch_size=8)
    before = torch.get_rng_state()
    assert len(list(data.val_dataloader())) == 1
    assert len(list(data.train_dataloader())) == 6
    assert torch.equal(before, torch.get_rng_state())


class TestRows:
    def test_messages(self, rows_file):
        data = made(rows_file, subset="first")
        row = sums(26)[0]
        assert text(data) == (
            f"<|im_start|>user\n{row['problem']}<|im_end|>\n<|im_start|>assistant\n{row['solution']}<|im_end|>"
        )
        assert text(data, learnt=True) == row["solution"] + "<|im_end|>"

    def test_prompt_and_completion(self, tmp_path):
        path = write_jsonl(tmp_path / "x.jsonl", [{"q": "One?", "a": "1"}, {"q": "Two?", "a": "2"}])
        data = made(path, prompt="q", completion="a")
        assert text(data, 1) == "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
        assert text(data, 1, learnt=True) == "2<|im_end|>"

    def test_a_system_prompt(self, rows_file):
        data = made(rows_file, system_prompt="Be brief.")
        assert text(data).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd")
        assert "brief" not in text(data, learnt=True)

    def test_too_long_ones_are_cut_or_dropped(self, rows_file):
        whole, cut, dropped = (
            made(rows_file, **more) for more in ({}, {"max_length": 50}, {"max_length": 50, "overlength": "drop"})
        )
        long = int((whole.train_rows.lengths > 50).sum())
        assert 0 < long < 26
        assert cut.train_rows.lengths.max() == 50
        assert (len(cut.train_rows), cut.train_rows.report.truncated) == (26, long)
        assert (len(dropped.train_rows), dropped.train_rows.report.dropped) == (26 - long, long)

    def test_other_files_to_validate_and_test_on(self, rows_file, tmp_path):
        val = write_jsonl(tmp_path / "val.jsonl", sums(5, seed=1))
        test = write_jsonl(tmp_path / "test.jsonl", sums(3, seed=2))
        data = made(rows_file, val_path=str(val), test_path=str(test))
        data.setup("test")
        assert [len(rows) for rows in (data.train_rows, data.val_rows, data.test_rows)] == [26, 5, 3]
        assert sum(len(batch) for batch in data.test_dataloader()) == 3
        with pytest.raises(UserError, match=r"set data\.test_path"):
            made(rows_file).test_dataloader()
        assert made(rows_file).val_dataloader() == []


class TestNumina:
    def test_the_hub_set_is_the_default(self):
        options = NuminaMathDataModule().options
        assert (options.dataset, options.path, options.messages) == ("AI-MO/NuminaMath-CoT", None, None)
        assert NuminaMathDataModule("x").options.dataset is None
        assert NuminaMathDataModule(dataset="mine").options.dataset == "mine"

    def test_without_a_network_one_error_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        data = NuminaMathDataModule()
        data.tokenizer = tiny_tokenizer()
        with pytest.raises(UserError, match=r"AI-MO/NuminaMath-CoT.*set data.path to a local") as caught:
            data.prepare_data()
        assert "\n" not in str(caught.value)

    def test_the_answer_is_the_raw_solution_and_eos(self, rows_file):
        data = made(rows_file, NuminaMathDataModule, subset="first")
        assert text(data, learnt=True) == sums(26)[0]["solution"] + "<|im_end|>"


def test_practice_problems_need_no_file(tmp_path):
    data = PracticeDataModule(problems=12, held_out=4, max_length=256, cache_dir=str(tmp_path))
    data.tokenizer = tiny_tokenizer()
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train_rows), len(data.val_rows), len(data.held_out)) == (12, 4, 4)


@pytest.mark.parametrize("micro", [8, 3])
def test_a_state_continues_with_the_remaining_batches(rows_file, micro):
    """In the middle of an epoch, at its end, and in a later one."""
    data = made(rows_file, global_batch_size=8, micro_batch_size=micro)
    each, epochs = data.sampler().micro_batches, []
    for epoch in range(3):
        sampler = data.sampler()
        sampler.set_epoch(epoch)
        epochs.append([[one for row in batch for one in row] for batch in sampler])
    assert all(one != other for one, other in pairwise(epochs))
    for epoch, steps in [(0, 0), (0, 1), (0, 3), (0, 4), (1, 2)]:
        progress = SimpleNamespace(current=SimpleNamespace(ready=steps * each))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        data.trainer = SimpleNamespace(
            fit_loop=loop,
            current_epoch=epoch,
            max_epochs=3,
            max_steps=-1,
            world_size=1,
            global_rank=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        later = made(rows_file, global_batch_size=8, micro_batch_size=micro)
        later.load_state_dict(data.state_dict())
        expected = epochs[epoch][steps * each :] or epochs[epoch + 1]
        got = [batch.row.tolist() for batch in later.train_dataloader()]
        assert got == expected


def test_the_accumulation_follows_from_the_batch_sizes(model_dir, rows_file):
    _, recorder, trainer = fit(model_dir, rows_file, data={"micro_batch_size": 3})
    assert trainer.accumulate_grad_batches == 3
    assert len(recorder.gradients) == int(np.ceil(26 / 8))
