"""Weightings within weightings, as users of `dft` write them: options, YAML, help, errors, resuming."""

from pathlib import Path

import pytest
import yaml
from conftest import sums, write_jsonl
from test_cli import dft, fails, here, scalars  # noqa: F401 - fixtures

from dft_lightning.__main__ import main
from dft_lightning.weighting import DFT, Bounded, Exempt, Mixed, Raised, Uniform
from dft_lightning.weighting.spec import from_spec

NESTED = {
    "class_path": "Exempt",
    "init_args": {
        "of": {
            "class_path": "Mixed",
            "init_args": {
                "of": {"class_path": "Raised", "init_args": {"of": {"class_path": "DFT"}, "power": 0.5}},
                "other": {"class_path": "DFT", "init_args": {"floor": 0.2}},
                "share": 0.5,
                "final_share": 0.0,
            },
        },
        "token_ids": [3, 4],
    },
}
MADE = Exempt(Mixed(Raised(DFT(), 0.5), DFT(0.2), share=0.5, final_share=0.0), token_ids=(3, 4))
OPTIONS = ["", "Exempt", ".of", "Mixed", ".of.of", "Raised", ".of.of.of", "DFT", ".of.of.power", "0.5"]
OPTIONS += [".of.other", "DFT", ".of.other.floor", "0.2", ".of.share", "0.5", ".of.final_share", "0"]
OPTIONS += [".token_ids", "[3,4]"]
COMMAND_LINE = [f"--model.weighting{part}" if index % 2 == 0 else part for index, part in enumerate(OPTIONS)]


def saved(run="run"):
    return from_spec(yaml.safe_load(Path(run, "config.yaml").read_text())["model"]["weighting"])


@pytest.mark.parametrize("road", ["command line", "yaml", "printed"])
def test_every_road_to_a_nested_weighting(dft, capsys, road):  # noqa: F811
    given = COMMAND_LINE
    if road != "command line":
        Path("nested.yaml").write_text(yaml.safe_dump({"model": {"weighting": NESTED}}))
        given = ["--config", "nested.yaml"]
    if road == "printed":
        with pytest.raises(SystemExit):
            dft("fit", *given, "--print_config")
        Path("printed.yaml").write_text(capsys.readouterr().out)
        assert main(["fit", "--config", "printed.yaml"]) == 0
    else:
        assert dft("fit", *given) == 0
    assert saved() == MADE
    assert sorted(scalars("run")["train/objective"]) == [1, 2, 3]


def test_a_default_part_is_null_and_means_uniform(dft, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        dft("fit", "--model.weighting", "Mixed", "--model.weighting.of", "DFT", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["weighting"]
    assert printed["init_args"]["other"] is None
    assert from_spec(printed) == Mixed(DFT(), Uniform())


def test_a_part_is_bounded_on_top_of_a_file(dft):  # noqa: F811
    Path("dft.yaml").write_text("model: {weighting: {class_path: Bounded, init_args: {of: {class_path: DFT}}}}")
    more = ["--model.weighting.low", "0.1", "--model.weighting.of.floor", "0.05", "--trainer.max_steps", "1"]
    assert dft("fit", "--config", "dft.yaml", *more) == 0
    assert saved() == Bounded(DFT(0.05), 0.1)


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["Nope"], ["--model.weighting 'Nope' is none of ASFT, Bounded, CADFT, CHORD,"]),
        (["Bounded", ".of", "Nope"], ["--model.weighting.of 'Nope' is none of ASFT, Bounded,"]),
        (["Mixed", ".of", "DFT", ".other", "Nope"], ["--model.weighting.other 'Nope' is none of ASFT, Bounded,"]),
        (["Exempt", ".of", "Bounded", ".of.of", "Nope"], ["--model.weighting.of.of 'Nope' is none of ASFT, Bounded,"]),
        (["Bounded"], ["of"]),
        (["Bounded", ".of", "DFT", ".lwo", "1"], ["lwo"]),
        (["Bounded", ".of", "DFT", ".of.flor", "1"], ["flor"]),
        (["Bounded", ".of", "DFT", ".of.floor", "7"], ["DFT.floor is 7.0; expected a number from 0 to 1"]),
        (["Mixed", ".of", "DFT", ".share", "2"], ["Mixed.share is 2.0; expected a share from 0 to 1"]),
        (["Exempt", ".of", "DFT", ".token_ids", "[a]"], ["token_ids"]),
        (["Bounded", ".of", "Modifier"], ["Modifier"]),
        (["DataWeighted", ".of", "DFT"], ["DataWeighted needs weights of the data, but no training row has any"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_one_clear_line(dft, capsys, options, patterns):  # noqa: F811
    options = ["", *options]
    given = [f"--model.weighting{part}" if index % 2 == 0 else part for index, part in enumerate(options)]
    fails(lambda: dft("fit", *given), capsys, *patterns)


def test_one_clear_line_for_a_file(dft, capsys):  # noqa: F811
    Path("wrong.yaml").write_text("model: {weighting: {class_path: Bounded, init_args: {of: {class_path: Nope}}}}")
    fails(lambda: dft("fit", "--config", "wrong.yaml"), capsys, "'Nope' is none of ASFT, Bounded,")


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.weighting.help", "Mixed"])
    said = capsys.readouterr().out
    for part in ("with a share s that may change over training", "the main weighting", "share of the training after"):
        assert part in said, part


def test_a_nested_field_that_has_changed_is_another_run(dft, capsys):  # noqa: F811
    def run(floor, *more):
        given = ["Bounded", ".of", "DFT", ".of.floor", floor]
        given = [f"--model.weighting{part}" if i % 2 == 0 else part for i, part in enumerate(["", *given])]
        return dft("fit", *given, *more)

    assert run("0.1", "--trainer.max_steps", "1") == 0
    fails(lambda: run("0.2"), capsys, "Bounded(of=DFT(floor=0.1), low=0.0, high=None) → Bounded(of=DFT(floor=0.2)")
    assert run("0.2", "--allow_changes", "[weighting]") == 0


def test_weights_from_a_column(dft):  # noqa: F811
    write_jsonl(Path("rows.jsonl"), [row | {"worth": number % 3} for number, row in enumerate(sums(32))])
    given = ["--data.weight", "worth", "--model.weighting", "DataWeighted", "--model.weighting.of", "Uniform"]
    assert dft("fit", *given) == 0
    assert 0.5 < scalars("run")["train/weight_mean"][1] < 1.5
    assert set(scalars("run")["train/weight_mean"].values()) != {1.0}
    assert dft("predict", *given) == 0
    import pyarrow.parquet as pq

    scores = pq.read_table("run/predictions").to_pandas()
    assert (scores["weight"] == scores["row"] % 3).all()
