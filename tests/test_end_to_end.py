"""The real model on maths rows, on two ranks that share its weights, from `fit` to an answer of the exported model."""

import pytest
import torch
from end_to_end import RealRuns, answer, export, furthest, killed, starts
from launching import LONG
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def both_cores():
    """The exported model is asked by this process alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_goes_on_and_its_export_is_the_model_that_was_trained(embedded_model_dir, tmp_path):
    """To the rounding of float32, from which the model that it began with is far."""
    runs = RealRuns(tmp_path, steps=3)
    assert killed(runs, "run") != 0
    again = runs.start("run", launcher=runs.launcher)
    assert again.wait(LONG) == 0, runs.log("run")
    assert starts(runs, "run") == [0, 2]
    assert "Going on from run/checkpoints/last.ckpt: step 2" in runs.log("run")
    out = export(runs, "run")
    apart, bound, tokens = furthest(tmp_path, AutoModelForCausalLM.from_pretrained(out))
    assert tokens > 50
    assert apart <= bound
    assert furthest(tmp_path, AutoModelForCausalLM.from_pretrained(embedded_model_dir))[0] > bound
    assert answer(out, "What is 7 + 5?").strip()
