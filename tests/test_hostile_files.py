"""Files are data: none that somebody else has made runs code, and each that would gives one clear message."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import sums, tiny_config, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from dft_lightning import FineTuner
from dft_lightning.__main__ import main
from dft_lightning.adapter_folders import adapter_of
from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.looks.initial import _read
from dft_lightning.checkpointing import RunCheckpoints, folder, read, skeleton
from dft_lightning.data.rendering import ChatRenderer
from dft_lightning.data.sources import load_rows
from dft_lightning.environment import FILE, starts
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model, load_tokenizer
from dft_lightning.reference import RowValues


class Harm:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()"

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def canary(tmp_path):
    """A file that is not there, nor is it after the test."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Harm(path)))
    assert path.exists()  # the trap works
    path.unlink()
    yield path
    assert not path.exists()


def hostile_checkpoint(folder: Path, canary: Path) -> object:
    torch.save({"state_dict": {}, "callbacks": Harm(canary)}, folder / "last.ckpt")
    return read(folder / "last.ckpt")


def hostile_pickle(folder: Path, canary: Path) -> object:
    (folder / "last.ckpt").write_bytes(pickle.dumps(Harm(canary)))
    return read(folder / "last.ckpt")


def hostile_reference(folder: Path, canary: Path) -> object:
    RowValues.write(folder, [(np.arange(2), np.ones(2, np.int64), np.zeros(2, np.float16))])
    np.save(folder / "values.npy", np.array([Harm(canary)], dtype=object), allow_pickle=True)
    return RowValues(folder)


def hostile_model(folder: Path, canary: Path) -> object:
    tiny_config().save_pretrained(folder)
    torch.save({"model.norm.weight": Harm(canary)}, folder / "pytorch_model.bin")
    return load_model(ModelSource(str(folder)))


def hostile_adapter(folder: Path, canary: Path) -> object:
    tiny_model().save_pretrained(folder / "base")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    adapter |= {"base_model_name_or_path": str(folder / "base"), "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"x": Harm(canary)}, folder / "adapter_model.bin")
    found = adapter_of(ModelSource(str(folder)), "continue")
    return found.add_to(load_model(ModelSource(str(folder / "base"))), found.lora())


def hostile_template(folder: Path, canary: Path) -> object:
    tokenizer = tiny_tokenizer()
    reach = "{% set a = ().__class__.__mro__[1].__subclasses__() %}"
    find = (
        "{% for c in a %}{% if c.__name__ == 'Popen' %}{{ c(['touch', '" + str(canary) + "']) }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = reach + find
    return ChatRenderer(tokenizer)


def hostile_script(folder: Path, canary: Path) -> object:
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.py").write_text(Harm(canary).code)
    return load_rows(dataset=str(folder / "rows"), path=None)


def hostile_code(folder: Path, canary: Path) -> object:
    return load_model(ModelSource(str(with_code(folder, canary))))


def with_code(folder: Path, canary: Path) -> Path:
    """A model whose own code, if it is allowed, touches the canary, and is that of Llama besides."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text(
        f"{Harm(canary).code}\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


KINDS = {
    hostile_checkpoint: "cannot read checkpoint",
    hostile_pickle: "cannot read checkpoint",
    hostile_reference: "remove that folder",
    hostile_model: "cannot load the weights",
    hostile_adapter: "cannot load the weights of the adapter",
    hostile_template: "chat template",
    hostile_script: "cannot load data.dataset",
    hostile_code: "cannot load the weights",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_none_runs_code_and_each_is_one_message(kind, tmp_path, canary):
    place = tmp_path / "theirs"
    place.mkdir()
    with pytest.raises(UserError, match=KINDS[kind]):
        kind(place, canary)


def test_what_is_computed_again_is_not_read(tmp_path, canary):
    np.save(tmp_path / "initial.npy", np.array([Harm(canary)], dtype=object), allow_pickle=True)
    assert _read(tmp_path / "initial.npy", (1,)) is None


@pytest.mark.parametrize("content", ['{"starts": ["x"]}', '{"starts": 1}', "[]", "{"])
def test_an_environment_of_another_form_is_set_aside(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.warns(UserWarning, match="no list of starts"):
        assert starts(tmp_path) == []


class TestIndex:
    """Of a sharded checkpoint, which is a pickle that PyTorch reads."""

    @pytest.fixture
    def path(self, tmp_path):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        RunCheckpoints(sharded=True).save_checkpoint({"state_dict": {"x": torch.ones(3)}}, tmp_path / "last.ckpt")
        dist.destroy_process_group()
        return tmp_path / "last.ckpt"

    @staticmethod
    def change(path, edit):
        index = pickle.loads((path / folder.INDEX).read_bytes())
        edit(index)
        (path / folder.INDEX).write_bytes(pickle.dumps(index))

    @pytest.mark.parametrize("name", ["float32", "Size", "Metadata", "anything"])
    def test_no_module_is_imported_whatever_its_attribute_is_called(self, path, name, tmp_path, canary, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "canary_of_index.py").write_text(Harm(canary).code)
        (path / folder.INDEX).write_bytes(f"ccanary_of_index\n{name}\n.".encode())
        with pytest.raises(UserError, match=rf"asks for canary_of_index\.{name}"):
            skeleton(path)

    def test_nothing_of_it_is_unpickled_by_pytorch(self, path, canary):
        (part,) = path.glob("*.distcp")

        def edit(index):
            (where, entry) = next(iter(index.storage_data.items()))
            torch.save(Harm(canary), part)
            index.state_dict_metadata["state_dict.x"] = BytesStorageMetadata()
            index.storage_data = {MetadataIndex("state_dict.x"): entry}
            entry.offset, entry.length = 0, part.stat().st_size
            assert where.fqn == "state_dict.x"

        self.change(path, edit)
        with pytest.raises(UserError, match="expected a tensor"):
            read(path)

    @pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "a/b"])
    def test_no_file_outside_the_folder_is_read(self, path, name, tmp_path):
        def edit(index):
            for entry in index.storage_data.values():
                entry.relative_path = name

        self.change(path, edit)
        with pytest.raises(UserError, match="expected files of the folder itself"):
            read(path)

    @pytest.mark.parametrize("content", [[], {}, None])
    def test_another_object_is_no_index(self, path, content):
        (path / folder.INDEX).write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="expected the index"):
            skeleton(path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one step of a plain model, with a checkpoint."""
    made = tmp_path_factory.mktemp("hostile run")
    tiny_model().save_pretrained(made / "model")
    tiny_tokenizer().save_pretrained(made / "model")
    rows = write_jsonl(made / "rows.jsonl", sums(16))
    options = {"callbacks": [Checkpoints()], "enable_checkpointing": True, "default_root_dir": made / "run"}
    fit(made / "model", rows, max_steps=1, **options)
    return made / "run"


def changed(run_dir, target, **options):
    """Its checkpoint with other stored options."""
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"] |= options
    torch.save(content, target)
    return target


class TestStoredTrust:
    """`trust_remote_code: true` in a checkpoint allows nothing."""

    @pytest.fixture
    def checkpoint(self, run_dir, tmp_path, canary):
        model = with_code(tmp_path / "theirs", canary)
        return changed(run_dir, tmp_path / "x.ckpt", model_name=str(model), trust_remote_code=True)

    def test_export_refuses_and_names_the_option(self, checkpoint, tmp_path, capsys):
        assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--trust_remote_code true" in line
        assert "auto_map in its config.json" in line
        assert not (tmp_path / "out").exists()

    def test_of_a_tokenizer_too(self, run_dir, tmp_path, capsys, canary):
        tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
        file = tmp_path / "tokenizer" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.T", None]}}))
        (file.parent / "own.py").write_text(Harm(canary).code)
        stored = {"tokenizer_name": str(file.parent), "trust_remote_code": True}
        assert main(["export", str(changed(run_dir, tmp_path / "x.ckpt", **stored)), str(tmp_path / "out")]) == 2
        assert "auto_map in its tokenizer_config.json" in capsys.readouterr().err

    def test_where_there_is_no_code_it_does_not_matter(self, run_dir, tmp_path):
        stored = changed(run_dir, tmp_path / "x.ckpt", trust_remote_code=True)
        assert main(["export", str(stored), str(tmp_path / "out")]) == 0

    def test_loading_in_python_refuses(self, checkpoint):
        with pytest.raises(UserError, match="cannot load"):
            FineTuner.load_from_checkpoint(checkpoint)

    def test_a_checkpoint_that_says_false_changes_nothing(self, checkpoint, run_dir, tmp_path, capsys):
        model = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["model_name"]
        stored = changed(run_dir, tmp_path / "y.ckpt", model_name=model, trust_remote_code=False)
        assert main(["export", str(stored), str(tmp_path / "out")]) == 2
        assert "cannot load" in capsys.readouterr().err


def test_the_advice_to_trust_works(run_dir, tmp_path):
    ran = tmp_path / "ran"
    model = with_code(tmp_path / "mine", ran)
    stored = changed(run_dir, tmp_path / "x.ckpt", model_name=str(model), trust_remote_code=True)
    assert main(["export", str(stored), str(tmp_path / "out"), "--trust_remote_code", "true"]) == 0
    assert ran.exists()


def test_an_export_imports_nothing_from_the_working_directory(run_dir, tmp_path, monkeypatch):
    """A folder with somebody's checkpoint may hold a yaml.py, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    assert main(["export", str(run_dir / "checkpoints" / "last.ckpt"), str(tmp_path / "out")]) == 0
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("name", ["hyper_parameters", "dft_lightning", "state_dict", "global_step"])
@pytest.mark.parametrize("value", [None, 1.5, "x", [1], {"a": 1}], ids=repr)
def test_a_checkpoint_of_another_form_is_one_message(run_dir, tmp_path, capsys, name, value):
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True) | {name: value}
    torch.save(content, tmp_path / "x.ckpt")
    assert main(["export", str(tmp_path / "x.ckpt"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.ckpt" in line


@pytest.mark.parametrize(
    "config", ["data: 1", "data: [1]", "data: {init_args: [1]}", "!!python/object:os.system {}", "["]
)
def test_a_configuration_beside_a_checkpoint_is_read_as_data(run_dir, tmp_path, config):
    (run_dir / "config.yaml").write_text(config)
    assert main(["export", str(run_dir / "checkpoints" / "last.ckpt"), str(tmp_path / "out")]) == 0
    (run_dir / "config.yaml").unlink()


def test_a_tokenizer_with_code_is_not_run(tmp_path, canary):
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    file.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(Harm(canary).code)
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(ModelSource(str(tmp_path)))
