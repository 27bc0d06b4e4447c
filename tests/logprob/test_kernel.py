"""When the Triton row step is used, what it refuses, and its cases in Triton's interpreter."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kernel_truth import BUILT_IN, Mine

from dft_lightning.logprob import LogitTransform, kernel, rows
from dft_lightning.weighting import DFT, ImportanceWeighted


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("cases", "some"),
    [("test_kernel_cases.py", ""), ("test_weighted_nll.py", "not lose_no_more and not RealShape")],
    ids=["the kernel", "the whole loss"],
)
def test_the_cases_in_the_interpreter(cases, some):
    """Whether or not there is a GPU, and whether or not this process has imported triton already.

    Not those of the loss that ask for the best bfloat16: the interpreter cuts bits off where a GPU rounds.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name(cases)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", some]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def test_which_weightings_are_fused():
    assert all(kernel.fuses(weighting) for weighting in BUILT_IN)
    assert not kernel.fuses(Mine())
    assert not kernel.fuses(ImportanceWeighted())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": Mine()}, "does not know Mine"),
        ({"weighting": ImportanceWeighted(level="token"), "ref_logp": None}, "needs ref_logp"),
        ({"names": ["mystery"]}, r"unknown statistics \['mystery'\]"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, "float64 logits; expected"),
        ({"logits": torch.zeros(2, 2).T}, r"strides \(1, 2\)"),
        ({"logits": torch.zeros(3, 2).T}, r"strides \(1, 2\)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.bfloat16), "dtype": torch.float32}, "does not fit"),
    ],
)
def test_what_would_be_wrong_is_refused(change, message):
    given = {
        "logits": torch.zeros(2, 3),
        "target": torch.zeros(2, dtype=torch.long),
        "weighting": DFT(),
        "factor": None,
        "ref_logp": None,
        "transform": LogitTransform(),
        "names": (),
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        kernel.fused_(**(given | change))


def test_the_plain_path_on_a_gpu_is_said_once():
    """Any device but the CPU stands for it: here tensors without content."""
    rows._say_once.cache_clear()
    logits = torch.empty(2, 3, device="meta")
    with pytest.warns(UserWarning, match="takes its plain path, which is slower than its kernel: the tensors are on"):
        assert not rows.kernel_serves(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not rows.kernel_serves(logits)
        assert not rows.kernel_serves(torch.empty(2, 3)), "nothing to say on a CPU"


class TestUnsuitable:
    """Each reason, and that it is said instead of raised."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        kernel._unsuitable.cache_clear()
        yield
        kernel._unsuitable.cache_clear()

    def test_wrong_device(self, monkeypatch):
        assert kernel.unsuitable(torch.device("cuda")) == "the tensors are on cuda and TRITON_INTERPRET is set"
        monkeypatch.delenv("TRITON_INTERPRET")
        assert kernel.unsuitable(torch.device("cpu")) == "the tensors are on cpu"

    def test_no_triton(self, monkeypatch):
        monkeypatch.setattr(kernel, "find_spec", lambda _: None)
        assert kernel.unsuitable(torch.device("cpu")) == "triton is not installed"

    def test_an_old_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "compute capability 7.5; the kernel needs 8.0" in kernel.unsuitable(torch.device("cuda"))

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
    def test_a_gpu_that_is_new_enough_is_tried(self, monkeypatch, capability):
        tried = []
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **options: shape)
        monkeypatch.setattr(kernel, "score", lambda *arguments: tried.append(arguments))
        assert kernel.unsuitable(torch.device("cuda")) is None
        assert tried == [((1, 1), (1,), LogitTransform(), ())]

    def test_an_amd_gpu(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET")
        monkeypatch.setattr(torch.version, "hip", "6.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
        assert kernel.unsuitable(torch.device("cuda")) == "the kernel has not been tried on AMD GPUs"

    def test_an_amd_gpu_that_is_not_used_does_not_matter(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.0")
        monkeypatch.setattr(kernel, "score", lambda *_: None)
        assert kernel.unsuitable(torch.device("cpu")) is None

    def test_a_broken_triton_is_tried_once(self, monkeypatch):
        tries = []
        monkeypatch.setattr(kernel, "find_spec", lambda _: "there")
        monkeypatch.setattr(kernel, "_functions", lambda: tries.append(1) or 1 / 0)
        for _ in range(2):
            assert kernel.unsuitable(torch.device("cpu")) == (
                "a first try of triton failed: ZeroDivisionError: division by zero"
            )
        assert len(tries) == 1


class Launched:
    """Stands for the Triton functions, and notes with what they are started."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return {(2,): lambda **options: self.calls.append((name, options))}


@pytest.mark.parametrize(
    ("vocabulary", "given", "block", "warps"),
    [
        (1, 4096, 1, 1),
        (2, 4096, 2, 1),
        (3, 4096, 4, 1),
        (256, 4096, 256, 1),
        (257, 4096, 512, 2),
        (1000, 256, 256, 1),
        (49_152, 4096, 4096, 16),
        (49_152, 16_384, 16_384, 32),
    ],
)
def test_a_program_looks_at_a_power_of_two_of_logits_and_no_more_than_there_are(
    vocabulary, given, block, warps, monkeypatch
):
    launched = Launched()
    monkeypatch.setattr(kernel, "_functions", lambda: launched)
    kernel.score(torch.zeros(2, vocabulary), torch.zeros(2, dtype=torch.long), LogitTransform(), (), block=given)
    [(name, options)] = launched.calls
    assert (name, options["block"], options["num_warps"]) == ("score", block, warps)
    assert (options["vocabulary"], options["stride"]) == (vocabulary, vocabulary)


def test_by_default_a_program_looks_at_4096_logits(monkeypatch):
    launched = Launched()
    monkeypatch.setattr(kernel, "_functions", lambda: launched)
    kernel.score(torch.zeros(2, 50_000), torch.zeros(2, dtype=torch.long), LogitTransform(), ())
    assert launched.calls[0][1]["block"] == 4096


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 320), (1000, 49_152), (3, 10**9)])
def test_copies_for_the_top_k_entropy_take_at_most_64_mib(rows, vocabulary):
    cut = list(kernel._few(torch.empty(rows, vocabulary, device="meta")))
    sizes = [min(each.stop, rows) - each.start for each in cut]
    assert sum(sizes) == rows
    assert cut[0].start == 0
    assert sizes[0] == min(max(1, 64 * 2**20 // (4 * vocabulary)), rows)
