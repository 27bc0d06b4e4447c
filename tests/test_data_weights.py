"""Weights of the data, and exempt stop tokens, in real runs; what is refused."""

import pytest
import torch
from conftest import sums, write_jsonl
from harness import fit

from dft_lightning.errors import UserError
from dft_lightning.weighting import DFT, DataWeighted, Exempt, Mixed, Renormalized, Uniform

# One optimizer step behind which stand some 10⁴ float32 roundings of 6e-8: see exactness.py.
BOUND = 1e-5
ROWS = sums(6)


def gradient(model, tmp_path, rows, weighting, **data):
    """The step's gradient times its number of tokens, which is the gradient of the sum."""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, recorder, trainer = fit(model, path, weighting, data={"shuffle": False} | data)
    return recorder.gradients[0] * int(trainer.datamodule.train_rows.targets.sum())


def weighted(*weights):
    return [row | {"worth": worth} for row, worth in zip(ROWS, weights, strict=True)]


def close(ours, truth):
    return float((ours - truth).norm() / truth.norm()) < BOUND


@pytest.mark.parametrize("weighting", [Uniform(), DFT()], ids=repr)
@pytest.mark.parametrize("layout", [{}, {"micro_batch_size": 2, "packing": True}])
def test_a_row_of_weight_2_is_that_row_twice_and_one_of_0_is_left_out(model_dir, tmp_path, weighting, layout):
    rows = weighted(1, 2, 1, 0, 1, 1)
    ours = gradient(model_dir, tmp_path, rows, DataWeighted(weighting), weight="worth", **layout)
    repeated = [ROWS[index] for index in (0, 1, 1, 2, 4, 5)]
    assert close(ours, gradient(model_dir, tmp_path, repeated, weighting))
    assert not close(ours, gradient(model_dir, tmp_path, ROWS, weighting))


def test_weights_of_1_change_nothing(model_dir, tmp_path):
    ours = gradient(model_dir, tmp_path, weighted(*[1] * 6), DataWeighted(DFT()), weight="worth")
    assert torch.equal(ours, gradient(model_dir, tmp_path, ROWS, DFT()))


def test_messages_and_tokens_have_weights_too(model_dir, tmp_path):
    """Message by message or token by token: the same gradient as by row."""
    chat = {"messages": "messages", "prompt": None, "completion": None, "end_of_response": "template"}
    worth = [1, 2, 0.5, 0, 1, 3]
    by_row = gradient(model_dir, tmp_path, weighted(*worth), DataWeighted(DFT()), weight="worth", **chat)
    messages = [
        row | {"messages": [row["messages"][0], row["messages"][1] | {"weight": weight}]}
        for row, weight in zip(ROWS, worth, strict=True)
    ]
    assert torch.equal(gradient(model_dir, tmp_path, messages, DataWeighted(DFT()), **chat), by_row)
    _, _, trainer = fit(model_dir, write_jsonl(tmp_path / "plain.jsonl", ROWS), data=chat)
    counts = trainer.datamodule.train_rows.targets.tolist()
    tokens = weighted(*([weight] * count for weight, count in zip(worth, counts, strict=True)))
    assert torch.equal(gradient(model_dir, tmp_path, tokens, DataWeighted(DFT()), weight="worth", **chat), by_row)


def test_stop_tokens_keep_their_weight(model_dir, rows_file):
    module, _, _ = fit(model_dir, rows_file, Exempt(DFT(), weight=0.75), max_steps=1)
    tokens = module.trained_on
    assert tokens.stop.sum() == 8  # a response each
    assert (tokens.weight[tokens.stop] == 0.75).all()
    assert torch.equal(tokens.weight[~tokens.stop], tokens.p[~tokens.stop])


def test_what_nobody_asks_for_is_not_carried_along(model_dir, rows_file):
    module, _, _ = fit(model_dir, rows_file, DFT(), max_steps=1)
    assert (module.trained_on.stop, module.trained_on.data_weight) == (None, None)
    batch = next(iter(module.trainer.datamodule.train_dataloader()))
    _, tokens = module.score(batch, frozenset({"stop", "data_weight", "entropy"}))
    assert tokens.stop.sum() == len(batch)
    assert (tokens.data_weight == 1).all()


@pytest.mark.parametrize("micro", [8, 3])
def test_a_mean_of_1_inside_another_modifier_is_over_the_whole_step(model_dir, rows_file, micro):
    weighting = Mixed(Renormalized(DFT()), share=0.0)
    _, recorder, _ = fit(model_dir, rows_file, weighting, data={"micro_batch_size": micro})
    assert [step["train/weight_mean"] for step in recorder.logged] == pytest.approx([1.0] * 4, rel=1e-5)


class TestRefusals:
    def test_a_column_that_the_weighting_does_not_ask_for(self, model_dir, tmp_path):
        wrap = (
            r"data\.weight is 'worth', but DFT asks for no weights: use --model\.weighting DataWeighted --model\.weigh"
        )
        with pytest.raises(UserError, match=wrap):
            gradient(model_dir, tmp_path, weighted(*[1] * 6), DFT(), weight="worth")

    def test_messages_that_have_some(self, model_dir, tmp_path):
        chat = {"messages": "messages", "prompt": None, "completion": None, "end_of_response": "template"}

        def rows(weight):
            return [row | {"messages": [row["messages"][0], row["messages"][1] | {"weight": weight}]} for row in ROWS]

        with pytest.raises(UserError, match=r"6 train rows have weights at their messages.*message_weights false"):
            gradient(model_dir, tmp_path, rows(0), Uniform(), **chat)
        ignored = gradient(model_dir, tmp_path, rows(0), Uniform(), message_weights=False, **chat)
        ones = gradient(model_dir, tmp_path, rows(1), Uniform(), **chat)  # they would change nothing
        assert torch.equal(ignored, ones)

    def test_rows_without_any(self, model_dir, tmp_path):
        with pytest.raises(UserError, match=r"DataWeighted needs weights of the data, but no training row has any"):
            gradient(model_dir, tmp_path, ROWS, DataWeighted(DFT()))

    def test_rows_to_validate_on_may_have_none(self, model_dir, tmp_path):
        chat = {"messages": "messages", "prompt": None, "completion": None, "end_of_response": "template"}
        rows = [row | {"messages": [row["messages"][0], row["messages"][1] | {"weight": 3}]} for row in ROWS]
        val = write_jsonl(tmp_path / "val.jsonl", sums(3, seed=1))
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        _, _, trainer = fit(model_dir, path, DataWeighted(Uniform()), data=chat | {"val_path": str(val)})
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert (logged["train/weight_mean"], logged["val/weight_mean"]) == (3.0, 1.0)
