"""The pictures: what stands where, and that nothing in a vocabulary makes them fail or warn."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dft_lightning.callbacks.looks.canvas import drawable
from dft_lightning.callbacks.looks.change import Push
from dft_lightning.callbacks.looks.heatmap import boxes, draw_solutions
from dft_lightning.callbacks.looks.pictures import draw_calibration, draw_positions, draw_pushes, draw_weights
from dft_lightning.callbacks.looks.tally import P_LABELS, POSITION_LABELS, Tally, sums_by_position
from dft_lightning.token_classes import CLASSES
from dft_lightning.weighting import TokenStats

STRANGE = ["$", "$x_", "\\frac{", "數", "\x00", "😀", "\ufffd", "", " \n\n", "%", "#", "^", "ﷺ"]


def painted(figure) -> np.ndarray:
    """(height, width, 3) as TensorBoard gets it; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        figure.canvas.print_png(file)
    return np.asarray(Image.open(file).convert("RGB"))


def tally(weight=None):
    logp = -torch.linspace(0.0, 12.0, 300).double()
    given = TokenStats(
        logp=logp,
        target=torch.arange(300) % 9,
        sequence=torch.arange(300) // 50,
        position=torch.arange(300) % 50,
        rank=torch.arange(300) % 3,
        top_p=logp.exp().clamp(min=0.05),
        weight=logp.exp() if weight is None else weight,
    )
    return Tally.of(given, torch.tensor([1]), torch.arange(9, dtype=torch.uint8))


def test_weights():
    given = tally()
    figure = draw_weights(given, "DFT(), step 5")
    over, density, classes, _ = figure.axes
    assert [bar.get_height() for bar in over.containers[0]] == pytest.approx(given.shares())
    by_p = (100 * given.weight_by_p / given.weight_by_p.sum()).tolist()
    assert [bar.get_height() for bar in over.containers[1]] == pytest.approx(by_p)
    assert [label.get_text() for label in density.get_xticklabels()] == list(P_LABELS)
    assert [label.get_text() for label in classes.get_yticklabels()] == list(CLASSES)
    shown = density.collections[0].get_array()
    assert shown.sum() == pytest.approx(100.0)
    assert shown.mask.sum() == (given.density == 0).sum()
    assert painted(figure).std() > 5
    painted(draw_weights(tally(torch.zeros(300).double()), "no weights"))


def test_calibration():
    given = tally()
    upper, lower = draw_calibration(given.calibration, "Step 5").axes
    tokens, confidence, right = given.calibration[given.calibration[:, 0] > 0].unbind(1)
    x, y = upper.lines[1].get_data()
    assert x.tolist() == (confidence / tokens).tolist()
    assert y.tolist() == (right / tokens).tolist()
    assert [bar.get_height() for bar in lower.patches] == pytest.approx((100 * given.calibration[:, 0] / 300).tolist())
    painted(draw_calibration(torch.zeros(10, 3).double(), "nothing"))


def test_positions():
    logp = -torch.ones(20).double()
    before = sums_by_position(torch.arange(20), 2 * logp)
    now = sums_by_position(torch.arange(20), logp)
    left, right = draw_positions(before, now, "step 5", "before training").axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[2.0] * 6, [1.0] * 6]
    assert right.lines[1].get_ydata() == pytest.approx([np.exp(-1)] * 6)
    assert [label.get_text() for label in left.get_xticklabels()] == list(POSITION_LABELS[:6])
    painted(left.figure)


def test_pushes_with_any_text():
    up = [Push(token, 1.0 + token, 0.5, 7) for token in range(len(STRANGE))][::-1]
    down = [Push(0, -3.0, 0.1, 5), Push(1, -2.0, 0.1, 5)]
    figure = draw_pushes(up, down, STRANGE, "Tokens")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-1] == "$  (5×)"
    assert labels[-2] == "$x_  (5×)"
    assert labels[0].endswith("(7×)")
    assert painted(figure).std() > 5


def test_boxes_follow_the_text():
    found = boxes(["ab", " cd", "e\n", "fgh", "ijklm", "n"], columns=6, lines=3)
    assert [(box.line, box.column, box.text) for box in found] == [
        *((0, 0, "ab"), (0, 2, "␣cd"), (1, 0, "e↵"), (2, 0, "fgh")),
    ]
    assert boxes(["a" * 50], columns=8)[0].text == "a" * 8
    assert boxes([]) == []


def test_solutions_are_coloured_by_p():
    """Left by the start's, right by now's: the middle of a box without ink is in its token's colour."""
    texts = ["   ", *STRANGE]
    ones, zeros = np.ones(len(texts)), np.zeros(len(texts))
    picture = painted(draw_solutions([(texts, zeros, ones)] * 2, "before training", "step 5")).astype(int)
    left, right = (picture[30:60, column].mean(0) for column in (12, picture.shape[1] // 2 + 10))
    assert left[0] > left[2] + 40  # red
    assert right[2] > right[0] + 40  # blue
    some = np.full(len(texts), np.nan)
    painted(draw_solutions([(texts, some, ones)], "before training", "step 5"))


def test_signs_that_the_font_lacks():
    assert drawable("a數b") == "a▯b"
    assert drawable("␣↵∅→\ufffd") == "␣↵∅→\ufffd"
