"""`dft weightings`: what it lists, explains and draws, and what it refuses."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from dft_lightning.__main__ import main
from dft_lightning.explain import find
from dft_lightning.explain.curves import curves, held, settings
from dft_lightning.explain.plot import as_text
from dft_lightning.weighting import (
    CADFT,
    DFT,
    EAFT,
    PSFT,
    SRFT,
    Focal,
    ImportanceWeighted,
    SentenceDFT,
    TokenStats,
    TokenTarget,
    TokenWeighting,
)
from dft_lightning.weighting.catalogue import entries

POINTS = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
NEED_A_FIELD = {"Thresholded"}


@dataclass(frozen=True)
class Plugged(TokenWeighting):
    """w = p²."""

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return tokens.p**2


@dataclass(frozen=True)
class Late(TokenWeighting):
    """w = the share of the training that is done."""

    def weights(self, tokens: TokenStats) -> torch.Tensor:
        return torch.full_like(tokens.logp, tokens.progress)


@dataclass(frozen=True)
class Smooth(TokenTarget):
    """q = 0.1 on each word."""

    def targets(self, tokens, logp, ref_logp):
        return torch.full_like(logp, 0.1)


def dft(capsys, *args) -> tuple[int, str, str]:
    status = main(["weightings", *args])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_list_has_every_weighting(capsys):
    status, out, _ = dft(capsys)
    assert status == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert listed == [entry.name for entry in entries()]
    assert "TALR                max(p^(1/τ), w_min)" in out
    assert (
        "Lin et al., 2509.20758 (known from others' code); scope step; needs log p only; cost: one more forward" in out
    )


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_each_is_explained(capsys, entry):
    status, out, err = dft(capsys, entry.name)
    assert (status, err) == (0, "")
    assert out.startswith(entry.signature)
    assert f"scope       {entry.scope or 'as'}" in out
    if entry.name in NEED_A_FIELD:
        assert "No plot: give --threshold VALUE" in out
    elif entry.scope is not None:
        assert "weight w\n" in out
        assert "push on the target's logit" in out


def test_fields_are_those_of_a_fit(capsys):
    assert "DFT(floor=0.25)" in dft(capsys, "DFT", "--floor", "0.25")[1]
    assert (
        "Thresholded(threshold=0.5, on='logp', keep='top')"
        in dft(capsys, "Thresholded", "--threshold=0.5", "--on", "logp")[1]
    )


def test_an_image(capsys, tmp_path):
    path = tmp_path / "focal.png"
    status, out, _ = dft(capsys, "Focal", "--gamma", "3", "--plot", str(path))
    assert status == 0
    assert str(path) in out
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["DTF"], "no weighting 'DTF'; there are ASFT, Bounded"),
        (["DFT", "--floor", "2"], "error: DFT.floor is 2.0; expected a number from 0 to 1"),
        (["DFT", "--flor", "0.1"], "error: --flor: DFT has no such option; did you mean --floor?"),
        (["DFT", "--floor", "much"], 'error: DFT: Parser key "floor": '),
        (["DFT", "--plot"], "--plot needs a file"),
        (["DFT", "--plot", "nowhere/dft.png"], "--plot nowhere/dft.png"),
        (["Thresholded", "--plot", "x.png"], "no plot of Thresholded: give --threshold VALUE"),
        (["--floor"], "takes a NAME first"),
        (["nowhere.Mine"], "cannot be imported"),
        (["collections.OrderedDict"], "is not a TokenWeighting"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_2(capsys, args, message):
    status, out, err = dft(capsys, *args)
    assert (status, out) == (2, "")
    assert err.startswith("dft: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_class_of_the_users_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_weightings.py").write_text(
        "from dataclasses import dataclass\n"
        "from dft_lightning.weighting import TokenWeighting\n\n"
        "@dataclass(frozen=True)\nclass Confident(TokenWeighting):\n"
        '    """w = p^power."""\n\n    power: float = 2.0\n\n'
        "    def weights(self, tokens):\n        return tokens.p**self.power\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, out, _ = dft(capsys, "my_weightings.Confident", "--power", "3")
    assert status == 0
    assert out.startswith("Confident(power=2.0)  (Yours)")
    assert "w           w = p^power." in out
    assert "Confident(power=3.0)" in out


def test_plug_ins_are_listed(capsys, monkeypatch):
    """What becomes of those that fail is a matter of `load_plugins`."""
    monkeypatch.setattr(find, "load_plugins", lambda: {"Plugged": Plugged})
    status, out, _ = dft(capsys)
    assert status == 0
    assert "Plug-ins:\n  Plugged             w = p²." in out
    assert "Plugged  (Plug-ins)" in dft(capsys, "Plugged")[1]


def test_it_starts_without_what_it_does_not_need():
    code = (
        "import sys; from dft_lightning.__main__ import main; main(['weightings', 'DFT']);"
        "sys.exit(bool({'lightning', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


class TestCurves:
    def test_of_p_alone(self):
        (curve,) = curves(DFT(0.2), POINTS)
        assert curve.weight.tolist() == pytest.approx([0.2, 0.5, 0.9])
        assert curve.push.tolist() == pytest.approx([0.18, 0.25, 0.09])
        assert held(DFT()) == ""

    def test_what_is_needed_is_held_at_three_levels(self):
        assert [setting.label for setting in settings(PSFT())] == ["p_old = 0.1", "p_old = 0.5", "p_old = 0.9"]
        middle = curves(PSFT(), POINTS)[1]
        assert middle.weight.tolist() == pytest.approx([0.2, 1, 0])  # .9/.5 is above the clip
        assert [float(curve.weight[0]) for curve in curves(EAFT(), POINTS)] == pytest.approx([0.1, 1 / 3, 2.5 / 3])

    def test_a_response_around_the_token(self):
        """Nine others at p: the geometric mean of ten."""
        assert [setting.others for setting in settings(SentenceDFT())] == [0.1, 0.5, 0.9]
        first = curves(SentenceDFT(), POINTS)[0]
        assert first.weight.tolist() == pytest.approx([0.1, (0.1**9 * 0.5) ** 0.1, (0.1**9 * 0.9) ** 0.1])
        assert "9 other tokens in the response, p around the given value" in held(SentenceDFT())
        assert "p around 0.5" in held(SRFT())

    def test_the_rest_of_a_response_is_as_likely_as_under_its_reference(self):
        middle = curves(ImportanceWeighted(), POINTS)[1]  # p_ref = .5
        assert middle.weight.tolist() == pytest.approx([0.2**0.1, 1, 1.8**0.1])

    def test_a_step_around_the_token(self):
        hard, _, easy = curves(CADFT(), POINTS)
        assert "15 responses" in held(CADFT())
        assert (easy.weight <= POINTS).all()
        assert easy.weight[0] < hard.weight[0]  # an unlikely token stands out among likely ones

    def test_a_schedule_is_seen(self):
        assert [float(curve.weight[0]) for curve in curves(Late(), POINTS)] == [0.0, 0.5, 1.0]

    def test_the_push_of_a_target(self):
        """q − p·Σq with 50 words: .1 − p·5, and no weight of its own."""
        (curve,) = curves(Smooth(), POINTS)
        assert curve.push.tolist() == pytest.approx([0.1 - 0.5, 0.1 - 2.5, 0.1 - 4.5])
        assert curve.weight.tolist() == [0, 0, 0]

    def test_focal_goes_the_other_way(self):
        (curve,) = curves(Focal(), POINTS)
        assert curve.weight.tolist() == sorted(curve.weight.tolist(), reverse=True)


def test_bars_by_hand():
    """Height 8 rows of 8 eighths over 0 to 2: 2 fills all, 1 half of them, 1/64 of 2 a single eighth of the last."""
    text = as_text("w", [""], [torch.tensor([0.0, 1 / 32, 1.0, 2.0])])
    lines = text.splitlines()
    assert lines[0] == "w"
    assert lines[1] == "       2 ┤   █"
    assert lines[5] == "         ┤  ██"
    assert lines[8] == "       0 ┤ ▁██"
    assert lines[9] == "         └────"
