"""`activation_checkpointing auto`, in a run."""

import pytest
from harness import fit

from dft_lightning import module as fine_tuning
from dft_lightning.planning import automatic
from dft_lightning.planning.memory import memory


@pytest.mark.parametrize("kind", ["none", "selective", "full", "nothing fits"])
def test_the_lightest_that_fits_is_in_force_and_said(model_dir, rows_file, monkeypatch, kind):
    """The device is as large as the kind needs to the byte, or too small for any."""
    said, chosen, whole = [], [], automatic.load_of

    def load_of(module, data):
        load = whole(module, data)
        monkeypatch.setattr(
            automatic, "capacity_of", lambda _: 1 if kind == "nothing fits" else memory(load, kind).peak
        )
        return whole(module, data)

    monkeypatch.setattr(automatic, "load_of", load_of)
    monkeypatch.setattr(automatic, "rank_zero_info", said.append)
    monkeypatch.setattr(fine_tuning, "recompute", lambda _, kind: chosen.append(kind))
    fit(model_dir, rows_file, module={"activation_checkpointing": "auto"}, max_steps=1)
    assert chosen == ["full" if kind == "nothing fits" else kind]
    assert said[0].startswith(f"Activation checkpointing: {chosen[0]} ")
    assert ("does not fit either" in said[0]) == (kind == "nothing fits")
    assert "none 0.0 GiB" in said[0]
