"""`run_dir/config.yaml`: the configuration of a fit, as parsed and merged, from when its training begins."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from dft_lightning.disk import writing
from dft_lightning.run_folder import bring_back, remove_aside


class SaveConfig(SaveConfigCallback):
    """Writes the file on the first rank. A start that comes to nothing leaves the folder as it was."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._began = False
        self._earlier = {path.name for path in _events(Path(self.config.run_dir))}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing is written yet: the run may still be refused."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Everything is in place: what `--overwrite` has set aside can go."""
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir))
            remove_aside(Path(trainer.default_root_dir))
        self._began = True

    def _write(self, folder: Path) -> None:
        unfinished = folder / ".config.yaml.unfinished"
        config = self.config.clone()
        config.ckpt_path, config.overwrite, config.allow_changes = None, False, []  # of this start, not of the run
        with writing(folder / "config.yaml", "--run_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(config, unfinished, skip_none=False, overwrite=True, multifile=False)
            unfinished.rename(folder / "config.yaml")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A false start: its events go, and what was set aside comes back."""
        run_dir = Path(trainer.default_root_dir)
        if self._began or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:  # it would write its file anew when it closes it
            with suppress(OSError):  # the disk may be why the run ends
                logger.finalize("failed")
        (run_dir / ".config.yaml.unfinished").unlink(missing_ok=True)
        for path in _events(run_dir):
            if path.name not in self._earlier:
                path.unlink()
        for folder in (run_dir / "tensorboard", run_dir):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()
        bring_back(run_dir)


def _events(run_dir: Path) -> list[Path]:
    """The files of TensorBoard's logger."""
    return [path for path in (run_dir / "tensorboard").glob("*") if path.is_file()]
