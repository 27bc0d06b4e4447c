"""What a run says about itself before it starts."""

import torch
from conftest import tiny_model
from harness import events, fit, logger

from dft_lightning.callbacks import RunSummary
from dft_lightning.callbacks.run_summary import run_facts
from dft_lightning.models import LoRA
from dft_lightning.weighting import DFT, Uniform


def test_terminal_and_tensorboard_say_the_same(model_dir, rows_file, tmp_path, capsys):
    _, _, trainer = fit(
        model_dir,
        rows_file,
        DFT(0.1),
        callbacks=[RunSummary()],
        logger=logger(tmp_path),
        default_root_dir=tmp_path,
        data={"micro_batch_size": 3},
    )
    shown = capsys.readouterr().out
    text = events(tmp_path).Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = trainer.datamodule.train_rows
    for said in (
        "w by DFT(floor=0.1)",
        "mean over the supervised tokens of the optimizer step",
        f"26 rows an epoch, {rows.targets.sum():,} supervised of {rows.lengths.sum():,} tokens",
        "8 sequences = 1 ranks × 3 micro-batches of at most 3",
        "4 (from step 0)",
        "highest val/p_mean",
        "1 × cpu",
        "float32",
    ):
        assert said in text, said
        assert said.split()[0] in shown


def test_what_lora_trains_is_counted(model_dir, rows_file):
    facts = {}

    class Keep(RunSummary):
        def on_fit_start(self, trainer, pl_module):
            facts.update(run_facts(trainer, pl_module))

    finetuner, _, _ = fit(
        model_dir, rows_file, Uniform(), module={"lora": LoRA()}, callbacks=[Keep()], max_steps=1, precision="bf16-true"
    )
    trained = sum(p.numel() for p in finetuner.parameters() if p.requires_grad)
    total = trained + sum(p.numel() for p in tiny_model().parameters())
    assert f"{trained / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters trained" in facts["model"]
    assert facts["precision"] == "bf16-true, weights in bfloat16, adapters in float32"
    assert {p.dtype for p in finetuner.parameters() if p.requires_grad} == {torch.float32}
    assert facts["best by"] == "lowest val/nll"
    assert facts["steps"] == "1 (from step 0)"
