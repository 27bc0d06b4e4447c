"""Every combination of the files in `configs/` trains, validates, resumes and is exported, or is refused by name.

On a tiny model of the family of each of `configs/models/`, and local rows; of what the files say, sizes, paths and the
number of devices alone are replaced.
"""

import io
import shutil
from collections import defaultdict
from contextlib import redirect_stdout
from itertools import combinations, product
from pathlib import Path

import pytest
import recipes
import torch
import yaml
from ranks import start
from recipes import (
    ALL,
    CONFIGS,
    MODELS,
    REFUSED,
    RUNNING,
    STEPS,
    VALUES,
    Recipe,
    compiled_once,
    configs,
    covering,
    pairs,
    refusal,
    run,
)
from safetensors.torch import load_file

from dft_lightning.__main__ import main
from dft_lightning.checkpointing import read

ROOT = CONFIGS.parent
#: Files that change nothing beside others: which recipe is the same without them.
SAME = [
    (["base", "dft", "precision/paper-bf16"], ["base", "dft"]),
    (["demo", "precision/paper-bf16"], ["demo"]),
    (["base", "dft", "packing", "fast"], ["base", "dft", "fast"]),
    (["base", "dft", "lora", "qlora"], ["base", "dft", "qlora"]),
]
CHOSEN = covering(RUNNING, compiled_once)
SHARDED = [recipe for recipe in RUNNING if recipe.is_sharded]


def rows_of(recipes_, exhaustive=False):
    """Parameters of a test; those of `make test-all` alone are marked."""
    marks = [pytest.mark.exhaustive] if exhaustive else []
    return [pytest.param(each, id=each.id, marks=marks) for each in recipes_]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where models, rows and runs are."""
    made = recipes.write_all(tmp_path_factory.mktemp("recipes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFT_CACHE", str(made / "cache"))
        yield made


@pytest.fixture(autouse=True)
def shared_cache(own_cache, folder, monkeypatch):
    """Tokens and references are those of the module's folder: recipes share them, as a user's runs do."""
    monkeypatch.setenv("DFT_CACHE", str(folder / "cache"))


def config_of(names, *more):
    """The merged configuration of these files."""
    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as leaving:
        main(["fit", *configs(names), *more, "--print_config"])
    assert leaving.value.code == 0
    return yaml.safe_load(said.getvalue())


class TestTheTable:
    def test_it_has_every_file(self):
        """A new file needs a place here (or in SAME), and a line in the README."""
        known = {name for recipe in ALL for name in recipe.files} | {name for names, _ in SAME for name in names}
        there = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.y*ml")}
        assert known == there

    def test_the_readme_names_every_file(self):
        text = (ROOT / "README.md").read_text()
        for path in CONFIGS.rglob("*.y*ml"):
            place = path.relative_to(CONFIGS)
            named = [f"`{place.name}`", f"configs/{place}"] + [f"`{place.parts[0]}/`"] * (len(place.parts) > 1)
            assert any(name in text for name in named), place

    def test_every_model_has_a_tiny_one(self):
        assert {*MODELS, ""} == recipes.FAMILIES.keys()

    def test_a_covering_part_has_all_pairs(self):
        for rows in ([*product("ab", "cde", "fg")], RUNNING, ALL):
            chosen = covering(rows)
            assert set(chosen) <= set(rows)
            assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, rows))
            assert chosen == covering(rows)
        assert len(covering([*product("ab", "cde", "fg")])) == 6
        assert len(CHOSEN) < len(RUNNING) / 10

    def test_it_has_all_pairs_of_values_but_those_that_cannot_be(self):
        possible = {(a, b) for a, b in combinations([*enumerate(VALUES)], 2)}
        every = {((i, x), (j, y)) for (i, first), (j, second) in possible for x, y in product(first, second)}
        missing = every - set().union(*map(pairs, CHOSEN))
        demo_with_model = {((0, "demo"), (1, model)) for model in MODELS}
        no_model = {((0, weighting), (1, "")) for weighting in VALUES.weighting if weighting != "demo"}
        assert missing - demo_with_model - no_model == {
            ((2, "qlora"), (4, "fsdp2")),
            ((2, "qlora"), (5, "fsdp2-fp32-master")),
        }


class TestMerging:
    @pytest.mark.parametrize(("names", "fewer"), SAME, ids=lambda names: "+".join(names))
    def test_files_that_change_nothing(self, names, fewer):
        assert config_of(names, "--model.model_name", "x") == config_of(fewer, "--model.model_name", "x")

    @pytest.mark.parametrize("recipe", rows_of(each for each in CHOSEN if len(each.files) > 5))
    def test_the_order_of_blocks_makes_no_difference(self, recipe):
        """Beside the first file, on which the others build."""
        first, *blocks = recipe.files
        more = ["--model.model_name", "x"]
        assert config_of([first, *blocks], *more) == config_of([first, *reversed(blocks)], *more)


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "said"), REFUSED.items(), ids=lambda value: "+".join(value) if isinstance(value, tuple) else ""
    )
    def test_before_anything_is_read_or_written(self, tmp_path, capsys, names, said):
        files = ["base", "dft", "models/qwen2.5-math-1.5b", *names]
        given = ["--model.model_name", "/no/model", "--data.path", "/no/rows.jsonl", "--run_dir", str(tmp_path / "run")]
        assert main(["fit", *configs(files), *given, "--trainer.accelerator", "cpu"]) == 2
        assert said in capsys.readouterr().err
        assert refusal(files) == said
        assert not (tmp_path / "run").exists()


def assert_exported(recipe: Recipe, folder: Path) -> None:
    """`dft export` writes what the run itself has exported: trained, in the right precision, with the stop tokens."""
    made = folder / recipe.id
    assert read(made / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    config = yaml.safe_load((made / "config.yaml").read_text())
    stops = config["export"]["stop_tokens"] or []
    command = ["export", str(made / "checkpoints" / "last.ckpt"), str(made / "out")]
    assert main([*command, *(["--stop_tokens", *stops] if stops else [])]) == 0
    (ours, theirs) = (
        {
            name: tensor
            for path in sorted((made / kind).glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }
        for kind in ("export", "out")
    )
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.isfinite().all(), name
        is_half = config["trainer"]["precision"] == "bf16-true" and "lora_" not in name  # adapters stay in float32
        assert tensor.dtype == (torch.bfloat16 if is_half else torch.float32), name
    assert_trained(recipe, folder, ours)
    for kind in ("export", "out") if not recipe.adapter else ():
        assert_answers(folder / recipe.id / kind, stops)


def assert_trained(recipe: Recipe, folder: Path, weights: dict) -> None:
    """Adapters start as zero on one side; the others differ from the model that was loaded."""
    if recipe.adapter:
        changed = [name for name, tensor in weights.items() if "lora_B" in name and tensor.any()]
        assert len(changed) == sum("lora_B" in name for name in weights) == 2 * 7  # layers × projections
        return
    before = load_file(folder / (recipe.model or "demo") / "model.safetensors")
    assert before.keys() == weights.keys()
    assert all(
        not torch.equal(before[name].to(tensor.dtype), tensor) for name, tensor in weights.items() if tensor.dim() == 2
    )


def assert_answers(exported: Path, stops: list[str]) -> None:
    """It is loaded as any model is, and knows its stop tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(exported) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer.encode("Add 1 and 2.")])
    assert model(input_ids=ids).logits.isfinite().all()
    ends = model.generation_config.eos_token_id
    assert {*map(tokenizer.convert_tokens_to_ids, stops)} <= {*(ends if isinstance(ends, list) else [ends])}


@pytest.mark.usefixtures("process_group")
class TestOneProcess:
    @pytest.mark.slow
    @pytest.mark.parametrize("recipe", rows_of(CHOSEN))
    def test_it_runs(self, recipe, folder):
        self.check(recipe, folder)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "recipe", rows_of((each for each in RUNNING if not each.is_sharded and each not in CHOSEN), exhaustive=True)
    )
    def test_every_other_one(self, recipe, folder):
        self.check(recipe, folder)

    def check(self, recipe, folder):
        assert run(recipe, folder) == [0, 0, 0]
        assert_exported(recipe, folder)
        shutil.rmtree(folder / recipe.id)


def grouped(recipes_):
    """By weighting and model: the ranks of a group are started once."""
    groups = defaultdict(list)
    for each in recipes_:
        groups[each.weighting, each.model].append(each)
    return groups.values()


class TestTwoRanks:
    """Recipes that shard the model."""

    @pytest.mark.slow
    def test_they_run(self, folder):
        """With and without blocks of every other kind but compilation."""
        plain = Recipe("iw_sft", "qwen2.5-math-1.5b", "", "", "fsdp2", "")
        full = Recipe("dft", "llama-3.1-8b", "lora", "packing", "fsdp2", "fsdp2-fp32-master")
        self.check([plain, full], folder)

    @pytest.mark.slow
    @pytest.mark.exhaustive
    @pytest.mark.parametrize("group", grouped(SHARDED), ids=lambda group: "+".join(filter(None, group[0][:2])))
    def test_every_one(self, group, folder):
        self.check(group, folder)

    def check(self, recipes_, folder):
        assert recipes_
        seconds = 300 + 60 * len(recipes_)
        start(2, recipes.__file__, "run_all", folder, *(each.id for each in recipes_), seconds=seconds)
        for each in recipes_:
            assert_exported(each, folder)
            shutil.rmtree(folder / each.id)
