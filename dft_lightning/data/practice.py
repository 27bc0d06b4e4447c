"""`PracticeDataModule`: the embedded practice problems as a data set."""

import json
from pathlib import Path
from typing import Any

from dft_lightning.data.datamodule import ChatDataModule
from dft_lightning.data.problems import practice_problems
from dft_lightning.disk import writing
from dft_lightning.embedded import cache_dir as default_cache_dir


class PracticeDataModule(ChatDataModule):
    """Practice problems from our own generator: no network, no file; training and held-out problems never meet.

    Args:
        problems: how many to train on.
        held_out: how many to validate on.
        problem_seed: of the generator.
    """

    def __init__(self, problems: int = 640, held_out: int = 48, problem_seed: int = 0, **kwargs: Any) -> None:
        folder = Path(kwargs.get("cache_dir") or default_cache_dir()) / "practice"
        self.files = {
            folder / f"train-{problems}-{problem_seed}.jsonl": practice_problems(problems, seed=problem_seed),
            folder / f"held_out-{held_out}-{problem_seed}.jsonl": practice_problems(
                held_out, seed=problem_seed, split="held_out"
            ),
        }
        self.held_out = list(self.files.values())[1]
        """The rows to validate on, in NuminaMath-CoT's schema."""
        train, val = (str(path) for path in self.files)
        if kwargs.get("ignore") is None:  # the same as the messages
            kwargs["ignore"] = sorted({"problem", "solution"} - {kwargs.get("prompt"), kwargs.get("completion")})
        super().__init__(path=train, val_path=val, **kwargs)

    def prepare_data(self) -> None:
        """Write the problems where the rest of the data stage reads them."""
        for path, rows in self.files.items():
            with writing(path, "--data.cache_dir"):
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
                unfinished.rename(path)
        super().prepare_data()
