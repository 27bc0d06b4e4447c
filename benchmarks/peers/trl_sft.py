"""TRL's `SFTTrainer` on rows that are tokenised already. Runs in TRL's environment; imports nothing of dft_lightning.

    python benchmarks/peers/trl_sft.py JOB.json        (`step_vs_peers.py` writes the job and starts this)

Settings, of TRL 1.16, whose `nll` and `dft` both score the logits in tiles and keep none:

    default      as TRL ships it: all rows of a step in one padded batch, activations recomputed, bfloat16 autocast
    fast         nothing recomputed, two padded rows at a time; no autocast, as the weights are bfloat16
    small        a row at a time, without padding, activations recomputed
    row          a row at a time, without padding, nothing recomputed
    padding_free all rows of a step in one flat row without padding, nothing recomputed. TRL's documentation has it for
                 flash attention only; with sdpa it runs, with a mask over all pairs of tokens

Rows come in the order of the file, the longest of each step first, so that padded batches hold rows of like length.
(`group_by_length` and `batch_rebalance` would shuffle, and the losses of single steps could not be compared.) Not
here, as they need a GPU: flash attention, Liger's and the hub's kernels.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from meter import Meter
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

FULL = {"gradient_checkpointing": False, "bf16": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rows": None},
    "fast": {"rows": 2, **FULL},
    "small": {"rows": 1, "gradient_checkpointing": True, "bf16": False},
    "row": {"rows": 1, **FULL},
    "padding_free": {"rows": None, "padding_free": True, "max_length": None, **FULL},
}


class Watch(TrainerCallback):
    """Tells the meter of steps and losses."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.step_done()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.meter.losses.append(logs["loss"])


def config(job: dict[str, Any]) -> SFTConfig:
    """The recipe that both sides share, and the setting on top."""
    setting = SETTINGS[job["setting"]] | job["overrides"]
    rows = setting.pop("rows") or job["rows"]
    if job["rows"] % rows:
        raise ValueError(f"{rows} rows at a time do not make up a step of {job['rows']}")
    recipe = {
        "max_steps": job["steps"],
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job["rows"] // rows,
        "loss_type": job["loss"],
        "learning_rate": job["lr"],
        "adam_beta1": job["betas"][0],
        "adam_beta2": job["betas"][1],
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "max_length": job["max_length"],
        "train_sampling_strategy": "sequential",
        "model_init_kwargs": {"dtype": job["dtype"]},
        "use_cpu": job["device"] == "cpu",
        "seed": 0,
    }
    if job["dtype"] == "float32":
        setting["bf16"] = False
    output = {"output_dir": job["folder"], "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return SFTConfig(**(recipe | {"logging_steps": 1} | output | setting))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    meter = Meter(job["warmup"])
    trainer = SFTTrainer(
        model=job["model"],
        args=config(job),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Watch(meter)],
    )
    meter.loaded(trainer.model)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = [sum(lengths[start : start + job["rows"]]) for start in range(0, len(rows), job["rows"])]
    read = int(trainer.state.log_history[-2].get("num_tokens", 0))
    if read != sum(tokens):
        raise ValueError(f"TRL has read {read} tokens, the file has {sum(tokens)}: it trained on other rows")
    meter.write(Path(job["result"]), tokens)


if __name__ == "__main__":
    main()
