"""What ranks write in parts, a run goes on from with any strategy, on any number of ranks; and it is exported."""

import cases
import folder_runs
import pytest
import torch
from exactness import GRADIENT, relative
from folder_runs import FORMS, KEPT, middle
from ranks import start
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints
from dft_lightning.checkpointing import checksums, read
from dft_lightning.checkpointing import folder as parts
from dft_lightning.errors import UserError

pytestmark = pytest.mark.slow  # starts other processes

NAMED = pytest.mark.parametrize("name", KEPT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the whole runs of two ranks, and what two ranks go on with."""
    made = tmp_path_factory.mktemp("folders")
    cases.prepare(made)
    start(2, folder_runs.__file__, "write", made)
    start(2, folder_runs.__file__, "go_on", made, "two")
    return made


def of(folder, run, name):
    return torch.load(folder / f"{run} {name}.pt")


@NAMED
def test_on_as_many_ranks_a_run_goes_on_to_the_bit(folder, name):
    ours, truth = of(folder, "two", name), of(folder, "whole at once", name)
    assert all(torch.equal(ours["weights"][key], value) for key, value in truth["weights"].items())
    assert len(ours["after"]) == len(truth["after"]) - 2 > 0
    assert all(map(torch.equal, ours["after"], truth["after"][2:]))


@NAMED
def test_what_is_written_meanwhile_is_the_same(folder, name):
    one, other = (read(middle(folder, name, form)) for form in FORMS)
    tensors = [parts.tensors_of(one), parts.tensors_of(other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    assert any(key.startswith("optimizer.0.") for key in tensors[0])


def saving(tmp_path):
    return {"callbacks": [Checkpoints()], "enable_checkpointing": True, "default_root_dir": tmp_path}


def assert_goes_on(ours, truth):
    assert len(ours["before"]) == len(truth["before"]) - 2 > 0
    for mine, theirs in zip(ours["before"], truth["before"][2:], strict=True):
        assert relative(mine, theirs) < GRADIENT


@pytest.mark.parametrize("count", [1, 4])
def test_on_another_number_of_ranks_up_to_rounding(folder, count):
    start(count, folder_runs.__file__, "go_on", folder, f"on {count}")
    for name in KEPT:
        assert_goes_on(of(folder, f"on {count}", name), of(folder, "whole at once", name))


def test_ranks_that_share_two_copies_write_one(folder):
    start(4, folder_runs.__file__, "write_copies", folder)
    path = folder / "two" / "checkpoints" / "last.ckpt"
    written, weights = read(path)["state_dict"], torch.load(folder / "two copies.pt")["weights"]
    assert all(torch.equal(written[f"network.{name}"], value) for name, value in weights.items())
    one = middle(folder, "all weights", "at once")
    size, of_one = (sum(part.stat().st_size for part in place.glob("*.distcp")) for place in (path, one))
    assert size < 1.5 * of_one


@NAMED
def test_with_a_strategy_that_does_not_shard(folder, name, tmp_path):
    origin = str(middle(folder, name, "at once"))
    ours = cases.outcome(folder, KEPT[name], **saving(tmp_path), ckpt_path=origin)
    assert_goes_on(ours, of(folder, "whole at once", name))


@NAMED
@pytest.mark.parametrize("form", FORMS)
def test_each_file_of_each_rank_has_a_checksum(folder, name, form):
    files = [*middle(folder, name, form).iterdir()]
    assert len(files) >= 4  # the index, the rest, and a part of each rank
    assert all(checksums.is_sealed(file) for file in files)


@NAMED
def test_each_rank_writes_its_part_alone(folder, name):
    path = middle(folder, name, "at once")
    sizes = [sum(part.stat().st_size for part in path.glob(f"__{rank}_*.distcp")) for rank in (0, 1)]
    assert min(sizes) > 0.4 * sum(sizes)


@NAMED
def test_dft_export_of_a_folder_is_the_model_that_the_run_exported(folder, name, tmp_path):
    run, out = folder / f"at once {name}", tmp_path / "model"
    merge = ["--merge_lora", "true"] if name == "LoRA" else []
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), str(out), *merge]) == 0
    ours = AutoModelForCausalLM.from_pretrained(out)
    theirs = AutoModelForCausalLM.from_pretrained(run / ("export-merged" if merge else "export"))
    ids = torch.arange(3, 43)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    weights = of(folder, "whole at once", name)["weights"]
    if not merge:
        assert all(torch.equal(weights[f"model.{key}"], value) for key, value in ours.named_parameters())


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    origin = middle(folder, "sizes that ranks cannot share evenly", "at once")
    case = KEPT["all weights"]
    with pytest.raises(UserError, match="the checkpoint is of a run with other options"):
        cases.outcome(folder, case, **saving(tmp_path), ckpt_path=str(origin))
