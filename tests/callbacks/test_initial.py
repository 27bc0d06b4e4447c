"""KL from the initial model, against full distributions in float64."""

import numpy as np
import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import events, fit, logger
from test_step_weights import Share

from dft_lightning.callbacks import Checkpoints, TokenProbabilities
from dft_lightning.callbacks.looks.initial import divergence
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.logprob.head import log_distribution
from dft_lightning.models import LoRA, WeightedLM, add_lora
from dft_lightning.weighting import DFT, ImportanceWeighted

FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "warmup_ratio": 0.0, "lr_schedule": "constant"}


def logits_of(model, row):
    """(targets, V) log π in float64 before each supervised token, by the model's own forward."""
    ids = torch.from_numpy(row["input_ids"])
    at = [place for place in range(1, len(ids)) if row["supervised"][place]]
    with torch.no_grad():
        every = model.double().eval()(ids[None]).logits[0].log_softmax(1)
    return torch.stack([every[place - 1] for place in at])


def distribution(network, hidden):
    head = network.base.get_output_embeddings()
    return log_distribution(hidden, head.weight, network._transform_of(head))


def kl_by_hand(before, now, rows):
    parts = []
    for index in range(len(rows)):
        first, second = (logits_of(model, rows[index]) for model in (before, now))
        parts.append((first.exp() * (first - second)).sum(1))
    return torch.cat(parts)


def logged(folder):
    return {event.step: event.value for event in events(folder).Scalars("probe/kl_initial")}


@pytest.mark.parametrize(
    ("weighting", "data", "module"),
    [
        (DFT(), {}, {}),
        (DFT(), {"packing": True, "max_length": 120}, {"attn_implementation": "varlen"}),
        (Share(), {}, {}),
        (ImportanceWeighted(), {}, {"lora": LoRA(rank=4)}),  # the reference is scored by the same network
    ],
    ids=["plain", "packed", "step scope", "adapter off as reference"],
)
def test_it_is_that_of_the_full_distributions(model_dir, rows_file, tmp_path, weighting, data, module):
    callback = TokenProbabilities(2, probe_rows=5, figure=False, kl_tokens=10**6)
    finetuner, _, _trainer = fit(
        model_dir,
        rows_file,
        weighting,
        module=FAST | module,
        data={"micro_batch_size": 4} | data,
        callbacks=[callback],
        logger=logger(tmp_path),
    )
    found = logged(tmp_path)
    initial = load_model(ModelSource(str(model_dir)))
    truth = kl_by_hand(initial, finetuner.model, callback._probe.rows).mean()
    assert found[0] == 0.0
    assert list(found) == [0, 2, 4]
    assert min(found[2], found[4]) > 0
    assert truth > 1e-3  # float32 log-probabilities are off by some 1e-6
    assert found[4] == pytest.approx(float(truth), rel=1e-3)


def test_only_some_tokens_are_kept_and_their_mean_is_taken(model_dir, rows_file, tmp_path):
    callback = TokenProbabilities(4, probe_rows=6, figure=False, kl_tokens=20)
    finetuner, _, _ = fit(model_dir, rows_file, module=FAST, callbacks=[callback], logger=logger(tmp_path))
    files = sorted((tmp_path / "tensorboard" / "probe").glob("*.npy"))
    kept = [np.load(file) for file in files]
    assert sum(map(len, kept)) == 20
    assert {one.dtype for one in kept} == {np.dtype("float32")}
    whole = kl_by_hand(load_model(ModelSource(str(model_dir))), finetuner.model, callback._probe.rows)
    chosen = np.unique(np.linspace(0, len(whole) - 1, 20).astype(int))
    assert logged(tmp_path)[4] == pytest.approx(float(whole[chosen].mean()), rel=1e-3)


def test_a_resumed_run_compares_with_the_initial_model(model_dir, rows_file, tmp_path):
    def run(folder, steps, **options):
        options |= {"module": FAST, "data": {"val_size": 6}, "default_root_dir": folder, "logger": logger(folder)}
        callbacks = [TokenProbabilities(1, probe_rows=4, figure=False), Checkpoints()]
        fit(model_dir, rows_file, max_steps=steps, callbacks=callbacks, enable_checkpointing=True, **options)

    run(tmp_path / "whole", 2)
    run(tmp_path / "cut", 1)
    run(tmp_path / "cut", 2, ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    whole, cut = logged(tmp_path / "whole"), logged(tmp_path / "cut")
    assert list(cut) == [0, 1, 2]
    assert cut[2] == pytest.approx(whole[2], rel=1e-6)
    for file in (tmp_path / "cut" / "tensorboard" / "probe").glob("*.npy"):
        file.unlink()
    with pytest.warns(UserWarning, match="probe/kl_initial leaves out tokens"):
        run(tmp_path / "cut", 3, ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert list(logged(tmp_path / "cut")) == [0, 1, 2]


def test_zero_tokens_keep_nothing(model_dir, rows_file, tmp_path):
    fit(model_dir, rows_file, callbacks=[TokenProbabilities(4, kl_tokens=0)], logger=logger(tmp_path), max_steps=1)
    assert not (tmp_path / "tensorboard" / "probe").exists()
    assert "probe/kl_initial" not in events(tmp_path).Tags()["scalars"]


def test_forbidden_tokens_count_nothing():
    before = torch.tensor([[0.5, 0.5, 0.0]]).log()
    now = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(before, now).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_the_distribution_is_the_models_own(family):
    """Bias, scale and soft-cap included; in float32 both round alike."""
    model = tiny_model(family).eval()
    network = WeightedLM(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        own = model(input_ids=ids).logits[0].log_softmax(1)
    torch.testing.assert_close(distribution(network, hidden), own, rtol=1e-5, atol=1e-5)


def test_half_precision_hidden_states_have_float32_distributions():
    """Against the same rounded states and head in float64: float32 products, not bfloat16 ones."""
    network = WeightedLM(add_lora(tiny_model(), LoRA(rank=2))).bfloat16()
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = network.base.get_output_embeddings().weight.double()
    with torch.autocast("cpu", torch.bfloat16):
        got = distribution(network, hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (hidden.double() @ head.T).log_softmax(1), rtol=1e-5, atol=1e-5)


def test_no_more_than_the_probe_can_be_kept(model_dir, tmp_path):
    """A probe smaller than `kl_tokens`, of one row."""
    rows = write_jsonl(tmp_path / "one.jsonl", sums(8))
    callback = TokenProbabilities(1, probe_rows=1, figure=False)
    fit(model_dir, rows, callbacks=[callback], logger=logger(tmp_path), max_steps=1)
    (file,) = (tmp_path / "tensorboard" / "probe").glob("*.npy")
    assert np.load(file).shape == (len(callback._probe), 320)
    assert len(tiny_tokenizer()) <= 320
