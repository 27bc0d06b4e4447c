"""The blocks for sharded runs, as a user starts them: they train, go on by themselves, and are exported."""

import pytest
import torch
from launching import ROOT, Runs
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.checkpointing import read

pytestmark = pytest.mark.slow
BLOCKS = " ".join(f"--config {ROOT / 'configs' / name}.yaml" for name in ("fsdp2", "precision/fsdp2-fp32-master"))


def test_two_ranks_train_one_goes_on_and_the_model_is_exported(tmp_path, monkeypatch):
    runs = Runs(tmp_path)
    runs.whole("run", f"{BLOCKS} --trainer.devices 2 --trainer.max_steps 6")
    folder = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert folder.is_dir()
    first = read(folder)
    assert first["global_step"] == 6
    assert first["state_dict"]["network.model.lm_head.weight"].dtype == torch.float32
    runs.whole("run", f"{BLOCKS} --trainer.devices 1 --trainer.max_steps 8 --checkpoints.sharded false")
    assert "step 6" in runs.log("run")
    assert folder.is_file()
    assert read(folder)["global_step"] == 8
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "out"]) == 0
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.generate(torch.arange(3, 9)[None], max_new_tokens=4).shape[1] > 6
