"""Every error of the command line's options names the option."""

import pytest

from dft_lightning.__main__ import main
from dft_lightning.parser import nameless, wrong_value

MIXED = ["--model.weighting", "Mixed"]
WRONG = {
    "a weighting in none": (
        [*MIXED, "--model.weighting.of.of", "DFT"],
        "--model.weighting.of.of is given, but not what --model.weighting.of is: name it before",
    ),
    "its option": (
        [*MIXED, "--model.weighting.of.floor=0.1"],
        "--model.weighting.of.floor is given, but not what --model.weighting.of is",
    ),
    "no weighting at all": (
        ["--model.weighting.of.of", "DFT"],
        "--model.weighting.of.of is given, but not what --model.weighting is",
    ),
    "an option that there is not": (
        [*MIXED, "--model.weighting.of", "DFT", "--model.weighting.of.flor", "1"],
        "--model.weighting.of.flor: DFT has no such option; did you mean --model.weighting.of.floor?",
    ),
    "a number": (
        ["--model.weighting", "DFT", "--model.weighting.floor=much"],
        "--model.weighting.floor is 'much'; expected float",
    ),
    "the innermost": (
        [*MIXED, "--model.weighting.of", "DFT", "--model.weighting.of.floor", "x", "--model.weighting.share", "0.5"],
        "--model.weighting.of.floor is 'x'; expected float",
    ),
    "an adapter's": (
        ["--model.weighting", "DFT", "--model.lora.rank", "x"],
        "--model.lora.rank is 'x'; expected int",
    ),
    "one of some": (
        ["--model.weighting", "DFT", "--model.quantization", "int3"],
        "--model.quantization is 'int3'; expected 'nf4'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(capsys, name):
    options, said = WRONG[name]
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "--model.model_name", "x", *options, "--print_config"])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dft: error: {said}")
    assert error.count("\n") == 1


def test_what_a_file_says_wrong_stays_as_it_was_said():
    """No word of the command line is at fault."""
    assert wrong_value("Parser key \"floor\": Expected a <class 'float'>. Got value: x", ["--config", "x"]) is None
    assert wrong_value("Option 'flor' is not accepted", ["--config", "flor.yaml"]) is None
    assert nameless('Parser key "of": TokenWeighting is abstract', ["--config", "a.yaml"]) is None
