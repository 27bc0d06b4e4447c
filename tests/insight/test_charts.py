"""Plots are well-formed, and as high as their numbers."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from dft_lightning.insight.charts import bars, colour, lines, stacks, strip


def parsed(markup):
    """The SVG of some markup; HTML that follows it is left out."""
    return ElementTree.fromstring(re.match(r"<svg.*?</svg>", markup, re.DOTALL)[0])


def test_bars_are_as_high_as_their_shares():
    drawn = [float(box.get("height")) for box in parsed(bars(["a", "b", "c"], [0.5, 0.25, 0.0], "x")).iter("rect")]
    assert drawn[0] == pytest.approx(2 * drawn[1], abs=0.1)  # coordinates have one decimal
    assert drawn[2] == 0


def test_stacks_are_cut_by_their_shares():
    drawn = [float(box.get("width")) for box in parsed(stacks(["a", "b"], {"one": [0.75, 0.25]})).iter("rect")]
    assert drawn[0] == pytest.approx(3 * drawn[1], abs=0.3)


def test_lines_have_a_point_for_each_group_and_a_legend():
    made = lines(["a", "b"], {"tokens": [0.5, 0.5], "DFT": [0.9, 0.1]}, "x")
    points = [(float(one.get("cx")), float(one.get("cy"))) for one in parsed(made).iter("circle")]
    assert len(points) == 4
    assert points[0][1] == points[1][1]
    assert points[2][1] < points[3][1]  # a larger share is higher up
    assert made.count('class="key"') == 2


def test_the_strip_is_logarithmic_and_holds_what_is_tiny():
    ticks = [
        float(one.get("d")[1:].split(" ")[0]) for one in parsed(strip([0.0, 1e-9, 1e-4, 1e-2, 1.0], {})).iter("path")
    ][7:]
    assert ticks[0] == ticks[1]
    assert ticks[3] - ticks[2] == pytest.approx(ticks[4] - ticks[3], abs=0.2)


@pytest.mark.parametrize("name", ["<script>", 'a"b', "a & b"])
def test_labels_are_escaped(name):
    for made in (bars([name], [1.0], name), lines([name], {name: [1.0]}, name), stacks([name], {name: [1.0]})):
        assert name in "".join(parsed(made).itertext())
        assert "<script" not in made


def test_any_number_of_series_have_a_colour_of_their_own():
    found = [colour(number) for number in range(40)]
    assert len(set(found)) == 40
    assert all(re.fullmatch(r"#[0-9a-f]{6}", one) for one in found)
