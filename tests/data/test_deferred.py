"""What is set on a data module after its loaders were made reaches their batches, whoever makes these."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from harness import fit
from lightning.pytorch.callbacks import ModelCheckpoint

from dft_lightning import ChatDataModule, FineTuner
from dft_lightning.reference import RowValues

#: Where batches are made: the start method of worker processes; None without any. A new interpreter starts slowly.
WORKERS = [
    None,
    "fork",
    pytest.param("spawn", marks=pytest.mark.slow),
    pytest.param("forkserver", marks=pytest.mark.exhaustive),
]


@pytest.fixture
def workers(request):
    """How many processes; with the start method in force."""
    before = torch.multiprocessing.get_start_method(allow_none=True)
    if request.param is not None:
        torch.multiprocessing.set_start_method(request.param, force=True)
    yield 0 if request.param is None else 1
    torch.multiprocessing.set_start_method(before, force=True)


def made(path, workers, **options):
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "max_length": 200, "val_path": path, "test_path": path}
    data = ChatDataModule(str(path), num_workers=workers, **(sizes | options))
    data.tokenizer = tiny_tokenizer()
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


def references(folder: Path, data: ChatDataModule, value: float) -> RowValues:
    """One value for every token of every row."""
    rows, counts = np.arange(len(data.train_rows)), data.train_rows.targets.astype(np.int64)
    RowValues.write(folder, [(rows, counts, np.full(counts.sum(), value, np.float32))])
    return RowValues(folder)


@pytest.mark.parametrize("workers", WORKERS, indirect=True)
def test_training(rows_file, tmp_path, workers):
    """Reference, shape of the batches, padding, and the position to resume from."""
    data = made(rows_file, workers, packing=True, pack_length=300)
    batches = iter(data.train_dataloader())
    data.load_state_dict({"epoch": 1, "steps": 2})
    data.reference["train"] = references(tmp_path / "reference", data, -1.5)
    data.fixed_shape, data.tokenizer.pad_token = True, "<|endoftext|>"
    batch = next(batches)
    sampler = data.sampler()
    assert batch.row.tolist() == [sequence for row in sampler.step(1, 2)[0] for sequence in row]
    assert torch.equal(batch.ref_logp, torch.full((len(batch.target),), -1.5))
    assert (batch.input_ids.shape, batch.longest) == ((sampler.height, 300), 300)
    assert batch.input_ids[0, -1] == data.tokenizer.pad_token_id


@pytest.mark.parametrize("workers", [None, "fork", pytest.param("spawn", marks=pytest.mark.exhaustive)], indirect=True)
@pytest.mark.parametrize("stage", ["val", "test", "train"])
def test_scoring(rows_file, tmp_path, workers, stage):
    data = made(rows_file, workers)
    loader = {"val": data.val_dataloader, "test": data.test_dataloader, "train": data.predict_dataloader}[stage]()
    batches = iter(loader)
    data.reference[stage] = references(tmp_path / "reference", data, -0.5)
    found = list(batches)
    assert sum(map(len, found)) == 26
    assert all(torch.equal(batch.ref_logp, torch.full((len(batch.target),), -0.5)) for batch in found)
    assert len(list(loader)) == len(found)  # and once more


class Curious(pl.Callback):
    """Has Lightning make the training loader as early as it can be made."""

    def setup(self, trainer, pl_module, stage):
        assert trainer.estimated_stepping_batches > 0
        assert trainer.train_dataloader is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_somebody_who_asks_for_the_number_of_steps_early_changes_nothing(model_dir, rows_file, tmp_path, workers):
    """A resumed run goes over the same rows as the undisturbed one, with the same reference."""
    from dft_lightning.weighting import ImportanceWeighted

    def run(steps, curious=True, **more):
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return fit(
            model_dir, rows_file, ImportanceWeighted(), max_epochs=2, max_steps=steps, enable_checkpointing=True,
            callbacks=[saving, *([Curious()] if curious else [])], data={"num_workers": workers}, **more,
        )[1].gradients  # fmt: skip

    undisturbed = run(6, curious=False)
    resumed = run(6, ckpt_path=str(tmp_path / "saved" / "step=2.ckpt"))
    assert len(resumed) == 4
    assert all(map(torch.equal, resumed, undisturbed[2:]))


def test_compiled_batches_have_one_shape_whoever_asks_early(model_dir, rows_file):
    """`fixed_shape` is set in the module's `setup`, after that of callbacks."""
    shapes = set()

    class Seen(Curious):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            shapes.add((*batch.input_ids.shape, len(batch.cu_seqlens), batch.longest))

    class Uncompiled(FineTuner):
        """Its batches are what is looked at."""

        def _prepare_layers(self, data):
            pass

    data = {"packing": True, "micro_batch_size": 2, "num_workers": 2}
    fit(model_dir, rows_file, module={"compile": True}, kind=Uncompiled, data=data, callbacks=[Seen()])
    assert len(shapes) == 1
