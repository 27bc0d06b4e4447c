"""What is published with a model says nothing of the machine that it was trained on."""

import json
import shutil

import pytest
from conftest import sums, write_jsonl

from dft_lightning.__main__ import main
from dft_lightning.exporting.card import _without_folders_within, without_folders


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("/home/me/data/*.jsonl", "*.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
    ],
)
def test_of_an_absolute_path_the_last_part_is_shown(name, shown):
    assert without_folders(name) == shown


def test_within_options(tmp_path):
    options = {
        "path": ["/gone/a.jsonl", "b.jsonl"],
        "template_kwargs": {"file": str(tmp_path), "style": "/think"},
        "end_of_response": "/n",
        "val_size": 3,
    }
    assert _without_folders_within(options) == {
        "path": ["a.jsonl", "b.jsonl"],
        "template_kwargs": {"file": tmp_path.name, "style": "/think"},
        "end_of_response": "/n",
        "val_size": 3,
    }


def texts(folder):
    names = (".md", ".json", ".jinja", ".txt")
    return {path.name: path.read_text() for path in folder.rglob("*") if path.suffix in names}


@pytest.mark.parametrize("lora", [[], ["--model.lora.rank", "2"]])
def test_no_file_of_an_export_has_a_path_of_the_machine(lora, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    model = shutil.copytree(model_dir, tmp_path / "secret" / "tiny")
    rows = write_jsonl(tmp_path / "secret" / "rows.jsonl", sums(8))
    shared = ["--model.model_name", str(model), "--model.tokenizer_name", str(model), "--model.weighting", "DFT"]
    shared += ["--data", "ChatDataModule", "--data.path", str(rows), "--data.val_path", str(rows)]
    shared += ["--data.cache_dir", str(tmp_path / "secret" / "cache"), "--data.max_length", "200"]
    shared += ["--data.global_batch_size", "4", "--data.micro_batch_size", "4", "--trainer.accelerator", "cpu"]
    assert main(["fit", *shared, *lora, "--run_dir", str(tmp_path / "secret" / "run")]) == 0
    run_dir = tmp_path / "secret" / "run"
    assert main(["export", str(run_dir / "checkpoints" / "last.ckpt"), str(tmp_path / "secret" / "out")]) == 0
    shutil.move(model, tmp_path / "moved")  # the card is made where the model may be no longer
    command = ["export", str(run_dir / "checkpoints" / "last.ckpt"), "later", "--model_name", str(tmp_path / "moved")]
    assert main(command) == 0
    for folder in (run_dir / "export", tmp_path / "secret" / "out", tmp_path / "later"):
        found = texts(folder)
        assert "path: rows.jsonl" in found["README.md"]
        assert "| Base model | `tiny` |" in found["README.md"]
        if lora:  # peft loads an adapter's base from there
            config = json.loads(found.pop("adapter_config.json"))
            assert config.pop("base_model_name_or_path") in (str(model), str(tmp_path / "moved"))
            found["adapter_config.json"] = json.dumps(config)
        assert [name for name, text in found.items() if str(tmp_path) in text or "secret" in text] == []
