"""Going on from a checkpoint: as the same run, whatever the geometry; as another one only where that is allowed."""

import copy
import json
import shutil

import lightning.pytorch as pl
import pytest
import torch
from conftest import CHATML, sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit

from dft_lightning.callbacks import Checkpoints
from dft_lightning.callbacks.checkpoints import checkpoint_folder
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA
from dft_lightning.resume import age, identity, rescale_progress
from dft_lightning.weighting import DFT, Uniform

PLAIN = {"lr_schedule": "constant", "warmup_ratio": 0.0}


def sgd(lr):
    return {"optimizer": lambda p: torch.optim.SGD(p, lr=lr)}


def run(model, rows, folder, *, weighting=None, module=None, data=None, every=1, callbacks=(), **options):
    return fit(
        model,
        rows,
        weighting,
        module=PLAIN | (module or {}),
        data={"micro_batch_size": 4} | (data or {}),
        callbacks=[*callbacks, Checkpoints(every, save_best=False)],
        enable_checkpointing=True,
        default_root_dir=folder,
        **options,
    )


def last(folder):
    return checkpoint_folder(folder) / "last.ckpt"


@pytest.fixture
def stopped(model_dir, rows_file, tmp_path):
    """The checkpoint of a run that was stopped after its second step of four."""
    run(model_dir, rows_file, tmp_path / "stopped", max_steps=2)
    return last(tmp_path / "stopped")


GEOMETRIES = [
    {"micro_batch_size": 8},
    {"micro_batch_size": 1},
    {"micro_batch_size": 3, "grouping": "plain"},
    {"micro_batch_size": 2, "packing": True},
    {"micro_batch_size": 2, "packing": "padding_free"},
]


@pytest.mark.parametrize("data", GEOMETRIES, ids=str)
@pytest.mark.parametrize("steps", [2, 4, 5])
def test_it_goes_on_in_another_geometry_with_the_same_gradients(model_dir, rows_file, tmp_path, data, steps):
    """In mid-epoch, at its end, and in the second one; bound as in exactness.py."""
    whole = run(model_dir, rows_file, tmp_path / "whole", max_epochs=2)[1]
    run(model_dir, rows_file, tmp_path / "parts", max_epochs=2, max_steps=steps)
    rest = run(model_dir, rows_file, tmp_path / "parts", max_epochs=2, data=data, ckpt_path=last(tmp_path / "parts"))[1]
    assert len(rest.gradients) == 8 - steps
    for ours, truth in zip(rest.gradients, whole.gradients[steps:], strict=True):
        assert (ours - truth).norm() < 1e-5 * truth.norm()


def test_progress_is_rescaled_by_hand():
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    checkpoint = {
        "dft_lightning": {"micro_batches": 3},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": dict(counts), "current": dict(counts)}}},
    }
    rescale_progress(checkpoint, 5)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == progress["total"] == {"ready": 10, "started": 10, "processed": 10, "completed": 9}
    progress["current"].update(ready=13, started=13, processed=13, completed=13)  # within a step
    checkpoint["dft_lightning"]["micro_batches"] = 5
    rescale_progress(checkpoint, 2)
    assert progress["current"] == {"ready": 4, "started": 4, "processed": 4, "completed": 4}


class StopAt(pl.Callback):
    """Asks for an end after so many micro-batches, as max_time does; or at the end of an epoch."""

    def __init__(self, batches=0, epoch=None):
        self.left, self.epoch = batches, epoch

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop |= self.left == 0

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop |= trainer.current_epoch == self.epoch


@pytest.mark.parametrize("stop", [StopAt(1), StopAt(2), StopAt(5), StopAt(8), StopAt(9), StopAt(epoch=0)])
@pytest.mark.parametrize("val", [{}, {"val_size": 4}], ids=["", "validated"])
def test_an_early_end_waits_for_the_step_and_is_gone_on_from_exactly(model_dir, rows_file, tmp_path, stop, val):
    """In the middle of an accumulation, in another epoch, at an epoch's end."""
    data = {"data": val, "max_epochs": 2}
    whole = run(model_dir, rows_file, tmp_path / "whole", **data)[1].gradients
    early = run(model_dir, rows_file, tmp_path / "parts", every=100, callbacks=[copy.copy(stop)], **data)[1].gradients
    stored = torch.load(last(tmp_path / "parts"), weights_only=True)
    an_epoch = 3 if val else 4
    assert stored["global_step"] == len(early) == (an_epoch if stop.epoch == 0 else -(-stop.left // 2))
    late = run(model_dir, rows_file, tmp_path / "parts", ckpt_path=last(tmp_path / "parts"), **data)[1].gradients
    for ours, truth in zip(early + late, whole, strict=True):
        assert torch.equal(ours, truth)


def test_a_second_fit_after_an_early_end_goes_on_to_its_own(model_dir, rows_file, tmp_path):
    finetuner, _, trainer = run(model_dir, rows_file, tmp_path, callbacks=[StopAt(3)])
    assert trainer.global_step == 2
    trainer.should_stop = False
    trainer.fit_loop.max_epochs = 3
    trainer.fit(finetuner, trainer.datamodule)
    assert trainer.global_step > 4


def test_a_wish_to_stop_that_is_not_granted_saves_nothing(model_dir, rows_file, tmp_path):
    """Before min_epochs it is not."""
    wish = StopAt(1)
    run(model_dir, rows_file, tmp_path, every=100, callbacks=[wish], min_epochs=2, max_epochs=2, max_steps=3)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3
    saved = []

    class Spy(Checkpoints):
        def _save(self, trainer, name):
            saved.append(trainer.global_step)
            super()._save(trainer, name)

    more = {"min_epochs": 2, "max_epochs": 2, "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(model_dir, rows_file, data={"micro_batch_size": 4}, callbacks=[StopAt(1), Spy(100)], **more)
    assert saved == [8]


def change_tokenizer(folder):
    path = folder / "chat_template.jinja"
    assert path.exists()
    path.write_text(CHATML.replace("'\n' + m", "'\n\n' + m"))


def change_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("change", "named", "allow"),
        [
            ({"weighting": Uniform()}, r"weighting: DFT\(floor=0.0\) → Uniform\(\)", "weighting"),
            ({"module": {"normalize": "sequences"}}, "normalize: tokens → sequences", "normalize"),
            ({"module": {"chat_template": "chatml"}}, r"tokenizer \(chat template\): None → chatml", "tokenizer"),
            ({"data": {"seed": 1}}, r"data \(seed\): 0 → 1", "data"),
            ({"data": {"global_batch_size": 4}}, r"data \(global_batch_size\): 8 → 4", "data"),
        ],
    )
    def test_is_refused_by_name_unless_that_is_allowed(
        self, model_dir, rows_file, tmp_path, stopped, change, named, allow
    ):
        with pytest.raises(UserError, match=rf"{named}.*--allow_changes '\[.*{allow}.*\]'"):
            run(model_dir, rows_file, tmp_path, ckpt_path=stopped, **change)
        everything = frozenset({allow, "data"} if allow == "tokenizer" else {allow})
        _, recorder, trainer = run(
            model_dir, rows_file, tmp_path, ckpt_path=stopped, max_steps=3, allow_changes=everything, **change
        )
        assert (len(recorder.gradients), trainer.global_step) == (1, 3)
        with pytest.raises(UserError):
            run(model_dir, rows_file, tmp_path, ckpt_path=stopped, allow_changes=frozenset({"model"}), **change)

    def test_other_rows_in_the_same_file(self, model_dir, rows_file, tmp_path, stopped):
        write_jsonl(rows_file, sums(26, seed=3))
        with pytest.raises(UserError, match=r"data \(rows\): \w+… → \w+…"):
            run(model_dir, rows_file, tmp_path, ckpt_path=stopped)

    @pytest.mark.parametrize(
        ("change", "named"),
        [(change_tokenizer, r"tokenizer \(content\)"), (change_architecture, r"model \(architecture\)")],
    )
    def test_something_else_under_the_same_name(self, model_dir, rows_file, tmp_path, change, named):
        """The name of the model's folder stays, what is in it does not."""
        folder = shutil.copytree(model_dir, tmp_path / "model")
        run(folder, rows_file, tmp_path / "run", max_steps=2)
        change(folder)
        with pytest.raises(UserError, match=named):
            run(folder, rows_file, tmp_path / "run", ckpt_path=last(tmp_path / "run"))

    def test_another_reference_model_under_the_same_name(self, model_dir, rows_file, tmp_path):
        from dft_lightning.loading import ModelSource, load_model
        from dft_lightning.weighting import ImportanceWeighted

        folder = shutil.copytree(model_dir, tmp_path / "model")
        run(folder, rows_file, tmp_path / "run", weighting=ImportanceWeighted(), max_steps=2)
        model = load_model(ModelSource(str(folder)))
        model.lm_head.weight.data[5, 5] += 0.25
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=r"model \(reference weights\)"):
            run(
                folder,
                rows_file,
                tmp_path / "run",
                weighting=ImportanceWeighted(),
                ckpt_path=last(tmp_path / "run"),
            )

    @pytest.mark.parametrize(
        ("change", "named"),
        [({"lora": LoRA(rank=2)}, "lora: None → "), ({"optimizer": torch.optim.AdamW}, "optimizer: SGD → AdamW")],
    )
    def test_what_does_not_fit_is_never_allowed(self, model_dir, rows_file, tmp_path, stopped, change, named):
        everything = frozenset({"model", "tokenizer", "data", "weighting", "normalize"})
        with pytest.raises(UserError, match=f"{named}.*its state does not fit"):
            run(model_dir, rows_file, tmp_path, ckpt_path=stopped, module=change, allow_changes=everything)

    def test_tensors_that_do_not_fit(self, rows_file, tmp_path, stopped):
        tiny_model(hidden_size=16).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=r"shapes \(network.model.*its state does not fit") as caught:
            run(tmp_path / "model", rows_file, tmp_path, ckpt_path=stopped, allow_changes=frozenset({"model"}))
        assert len(str(caught.value)) < 2000

    def test_every_difference_is_named_at_once(self, model_dir, rows_file, tmp_path, stopped):
        change = {"module": {"chat_template": "chatml", "normalize": "sequences"}, "data": {"seed": 1}}
        with pytest.raises(UserError, match=r"--allow_changes '\[data, normalize, tokenizer\]'"):
            run(model_dir, rows_file, tmp_path, ckpt_path=stopped, **change)

    def test_the_same_folder_by_another_path_is_the_same(self, model_dir, rows_file, tmp_path, stopped):
        (tmp_path / "link").symlink_to(model_dir)
        run(tmp_path / "link", rows_file, tmp_path, ckpt_path=stopped)

    def test_a_checkpoint_of_something_else(self, model_dir, rows_file, tmp_path, stopped):
        checkpoint = torch.load(stopped, weights_only=True)
        del checkpoint["dft_lightning"]
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match="not written by a training run of dft-lightning"):
            run(model_dir, rows_file, tmp_path, ckpt_path=tmp_path / "other.ckpt")


def test_the_order_of_settings_in_config_json_is_no_difference(model_dir, rows_file, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, settings in zip(folders, ({"alpha": 1, "zeta": 2}, {"zeta": 2, "alpha": 1}), strict=True):
        shutil.copytree(model_dir, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(settings | json.loads(path.read_text())))
    found = [fit(folder, rows_file, max_steps=1)[0] for folder in folders]
    orders = [[key for key in module.network.base.config.to_dict() if key in ("alpha", "zeta")] for module in found]
    assert orders == [["alpha", "zeta"], ["zeta", "alpha"]]  # else there is nothing to see
    one, two = (identity(module)["model"]["architecture"] for module in found)
    assert one == two


class TestSettings:
    def test_a_new_learning_rate_is_in_force_and_said(self, model_dir, rows_file, tmp_path, caplog):
        """A checkpoint brings its own along, which would win without a word."""
        run(model_dir, rows_file, tmp_path, module=sgd(0.01), max_steps=2)
        _, recorder, _ = run(model_dir, rows_file, tmp_path, module=sgd(0.002), ckpt_path=last(tmp_path))
        assert [one["train/lr"] for one in recorder.logged[-2:]] == pytest.approx([0.002, 0.002])
        assert "lr 0.01 → 0.002" in caplog.text
        assert "steps 2 → 4" in caplog.text

    def test_a_longer_run_follows_its_own_schedule(self, model_dir, rows_file, tmp_path):
        linear = {"lr_schedule": "linear"}
        run(model_dir, rows_file, tmp_path, module=linear, max_steps=2)
        _, recorder, _ = run(model_dir, rows_file, tmp_path, module=linear, max_epochs=2, ckpt_path=last(tmp_path))
        rates = [one["train/lr"] for one in recorder.logged[-6:]]
        assert rates == pytest.approx([0.01 * (8 - step) / 8 for step in range(2, 8)])

    def test_other_settings_of_the_optimizer_too(self, model_dir, rows_file, tmp_path, caplog):
        def adam(betas):
            return {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01, betas=betas)}

        run(model_dir, rows_file, tmp_path, module=adam((0.9, 0.95)), max_steps=2)
        _, _, trainer = run(
            model_dir, rows_file, tmp_path, module=adam((0.9, 0.999)), ckpt_path=last(tmp_path), max_steps=3
        )
        assert trainer.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)
        assert "betas (0.9, 0.95) → (0.9, 0.999)" in caplog.text

    @pytest.mark.parametrize(
        ("then", "now", "said"),
        [
            ({"module": {"lr_schedule": "linear"}}, {}, "lr_schedule linear → constant"),
            ({}, {"module": {"warmup_ratio": 0.5}}, "warmup_ratio 0.0 → 0.5"),
            ({}, {"gradient_clip_val": 0.01}, "gradient_clip_val None → 0.01"),
            ({}, {"precision": "bf16-true"}, "precision 32-true → bf16-true, dtype torch.float32 → torch.bfloat16"),
        ],
    )
    def test_whatever_changes_the_rest_of_the_run_is_said(
        self, model_dir, rows_file, tmp_path, caplog, then, now, said
    ):
        run(model_dir, rows_file, tmp_path, max_steps=2, **then)
        run(model_dir, rows_file, tmp_path, ckpt_path=last(tmp_path), **now)
        assert said in caplog.text

    def test_nothing_is_said_where_nothing_changed(self, model_dir, rows_file, tmp_path, caplog):
        run(model_dir, rows_file, tmp_path)
        run(model_dir, rows_file, tmp_path, ckpt_path=last(tmp_path))
        assert "other settings" not in caplog.text

    def test_a_schedule_that_looks_at_the_loss_is_refused(self, model_dir, rows_file):
        with pytest.raises(UserError, match="expected one that is a function of the step"):
            fit(model_dir, rows_file, DFT(), module={"lr_schedule": "reduce_lr_on_plateau"})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3, "3 seconds"), (119, "119 seconds"), (600, "10 minutes"), (9000, "2 hours"), (1e6, "12 days")],
)
def test_ages(seconds, said):
    assert age(seconds) == said
