"""`dft`, as its users type it."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import sums, write_jsonl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dft_lightning.__main__ import main
from dft_lightning.adapters import LoRA
from dft_lightning.embedded import NAME

CONFIGS = Path(__file__).parents[1] / "configs"
BLOCKS = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("precision/*.yaml")]
    if path.stem != "base"
)
OWN = '''
from dataclasses import dataclass
from torch import Tensor
from dft_lightning.weighting import TokenStats, TokenWeighting


@dataclass(frozen=True)
class Confident(TokenWeighting):
    """w = p^power."""

    power: float = 2.0

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p**self.power


@dataclass(frozen=True)
class Sentence(TokenWeighting):
    """w = the geometric mean of p over the response."""

    scope = "sequence"

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.sequence_mean(tokens.logp).exp()


@dataclass(frozen=True)
class Careless(TokenWeighting):
    """Depends on the chunk it is given."""

    def weights(self, tokens: TokenStats) -> Tensor:
        return tokens.p / tokens.p.mean()
'''


@pytest.fixture
def here(tmp_path, monkeypatch, model_dir):
    """A working folder with rows and a user's file; the model is `model_dir`."""
    write_jsonl(tmp_path / "rows.jsonl", sums(32))
    name = f"own_{tmp_path.name}".replace("-", "_")  # a module of its own for each test
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def dft(here, model_dir):
    def call(command, *more, data=True):
        base = ["--model.model_name", str(model_dir), "--trainer.accelerator", "cpu", "--run_dir", "run"]
        if data:
            base += ["--data", "NuminaMathDataModule", "--data.path", "rows.jsonl", "--data.val_size", "8"]
            base += ["--data.global_batch_size", "8", "--data.micro_batch_size", "4", "--data.max_length", "200"]
        return main([command, *base, *map(str, more)])

    return call


def fails(call, capsys, *patterns):
    """Exit code 2 and one line that says it; nothing of a traceback."""
    try:
        code = call()
    except SystemExit as leaving:
        code = leaving.code
    error = capsys.readouterr().err
    line = error.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("dft: error: ")
    assert "Traceback" not in error
    for pattern in patterns:
        assert pattern in line, line
    return line


def scalars(run):
    events = EventAccumulator(str(Path(run) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


class TestFit:
    def test_leaves_everything_in_the_run_folder(self, dft, capsys):
        assert (
            dft("fit", "--model.weighting", "DFT", "--model.weighting.floor", "0.1", "--trainer.max_epochs", "2") == 0
        )
        printed = capsys.readouterr().out
        for said in (
            "DFT(floor=0.1)",
            "mean over the supervised tokens",
            "24 rows an epoch",
            "32-true",
            "parameters trained",
            "highest val/p_mean",
            "1 × cpu",
            "min left",
        ):
            assert said in printed, said
        run = Path("run")
        files = {".dft-run.json", "config.yaml", "environment.json", "checkpoints", "export", "tensorboard"}
        assert {path.name for path in run.iterdir()} == files
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
        logged = scalars(run)
        assert sorted(logged["train/objective"]) == [1, 2, 3, 4, 5, 6]
        assert {"train/nll", "train/weight_mean", "train/grad_norm", "train/lr", "val/nll", "val/top1"} <= set(logged)

    def test_its_saved_configuration_gives_the_same_run(self, dft):
        assert dft("fit", "--model.weighting", "DFT") == 0
        assert main(["fit", "--config", "run/config.yaml", "--run_dir", "again"]) == 0
        first, second = scalars("run"), scalars("again")
        for tag in ("train/objective", "train/grad_norm", "val/nll"):
            assert first[tag] == second[tag]

    @pytest.mark.parametrize(
        ("name", "message"), [("Confident", None), ("Sentence", None), ("Careless", "scope = 'step'")]
    )
    def test_with_a_weighting_from_the_users_own_file(self, dft, here, capsys, name, message):
        def call():
            return dft("fit", "--model.weighting", f"{here}.{name}")

        if message:
            fails(call, capsys, "Careless", message)
            assert not Path("run").exists()
            return
        assert call() == 0
        assert f"{name}(" in capsys.readouterr().out
        assert (
            yaml.safe_load(Path("run/config.yaml").read_text())["model"]["weighting"]["class_path"] == f"{here}.{name}"
        )

    def test_the_same_command_goes_on_where_the_run_stopped(self, dft):
        """And later events than the checkpoint's are purged, so that no step is there twice."""
        options = ("--model.weighting", "DFT", "--trainer.max_epochs", "2", "--checkpoints.every_n_steps", "2")
        assert dft("fit", *options, "--run_dir", "whole") == 0
        assert dft("fit", *options, "--trainer.max_steps", "2") == 0
        assert dft("fit", *options) == 0
        assert sorted(scalars("run")["train/nll"]) == [1, 2, 3, 4, 5, 6]
        # the schedule of the first, shorter run was another one; only the data order is compared here
        before, after = scalars("whole")["train/weight_mean"], scalars("run")["train/weight_mean"]
        assert before.keys() == after.keys()
        assert dft("fit", *options) == 0  # finished: nothing left to do, nothing lost
        assert sorted(scalars("run")["train/nll"]) == [1, 2, 3, 4, 5, 6]

    def test_a_finished_or_other_run_is_not_overwritten_unasked(self, dft, capsys):
        assert dft("fit", "--model.weighting", "DFT") == 0
        stamp = Path("run/checkpoints/last.ckpt").stat().st_mtime_ns
        fails(
            lambda: dft("fit", "--model.weighting", "Uniform"),
            capsys,
            "weighting: DFT(floor=0.0) → Uniform()",
            "--allow_changes '[weighting]'",
        )
        assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == stamp
        nowhere = ("--model.model_name", "/no/model", "--overwrite", "true")
        fails(lambda: dft("fit", "--model.weighting", "Uniform", *nowhere), capsys, "/no/model")
        assert Path("run/checkpoints/last.ckpt").stat().st_mtime_ns == stamp  # not lost by a false start
        assert dft("fit", "--model.weighting", "Uniform", "--overwrite", "true") == 0
        assert not Path("run/.overwritten").exists()
        assert sorted(scalars("run")["train/nll"]) == [1, 2, 3]

    def test_options_win_over_those_in_a_checkpoint(self, dft, capsys):
        assert dft("fit", "--model.weighting", "DFT", "--model.weighting.floor", "0.5") == 0
        checkpoint = ("--ckpt_path", "run/checkpoints/last.ckpt", "--run_dir", "other")
        capsys.readouterr()
        assert (
            dft(
                "fit",
                "--model.weighting",
                "DFT",
                "--model.weighting.floor",
                "0.9",
                "--trainer.max_epochs",
                2,
                "--allow_changes",
                "[weighting]",
                *checkpoint,
            )
            == 0
        )
        assert "DFT(floor=0.9)" in capsys.readouterr().out
        assert scalars("other")["train/weight_mean"][5] > 0.85
        assert dft("validate", "--model.weighting", "Uniform", *checkpoint) == 0
        assert "1.0" in capsys.readouterr().out.split("val/weight_mean")[1].splitlines()[0]

    def test_the_saved_configuration_of_a_continued_run_starts_a_run_of_its_own(self, dft, capsys):
        options = ("--model.weighting", "DFT", "--checkpoints.every_n_steps", "1")
        assert dft("fit", *options, "--trainer.max_steps", "1") == 0
        assert dft("fit", *options, "--overwrite", "false") == 0
        saved = yaml.safe_load(Path("run/config.yaml").read_text())
        assert (saved["ckpt_path"], saved["overwrite"]) == (None, False)
        capsys.readouterr()
        assert main(["fit", "--config", "run/config.yaml", "--run_dir", "new", "--model.weighting", "Uniform"]) == 0
        said = capsys.readouterr().out
        assert "Uniform()" in said
        assert "from step 0" in said
        assert sorted(scalars("new")["train/nll"]) == [1, 2, 3]

    def test_how_old_a_checkpoint_is_and_that_a_later_one_was_cut_off(self, dft, caplog):
        options = ("--model.weighting", "DFT", "--checkpoints.every_n_steps", "1")
        assert dft("fit", *options, "--trainer.max_steps", "2") == 0
        os.utime("run/checkpoints/last.ckpt", times=(time.time() - 7300,) * 2)
        whole = Path("run/checkpoints/last.ckpt").read_bytes()
        Path("run/checkpoints/.last.ckpt.unfinished").write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        assert dft("fit", *options) == 0
        said = "Going on from run/checkpoints/last.ckpt: step 2, written 2 hours ago (a later one was cut off"
        assert said in caplog.text
        kept = {"last.ckpt", ".last.ckpt.before", "best.ckpt"}
        assert {path.name for path in Path("run/checkpoints").iterdir()} == kept
        assert scalars("run")["train/skipped_steps"].keys() == {1, 2, 3}

    def test_only_a_cut_off_checkpoint_is_none_at_all(self, dft, caplog):
        Path("run/checkpoints").mkdir(parents=True)
        Path("run/.dft-run.json").touch()
        Path("run/checkpoints/.last.ckpt.unfinished").write_bytes(b"PK half")
        assert dft("fit", "--model.weighting", "DFT", "--ckpt_path", "last") == 0
        assert "no whole checkpoint, only one that was cut off" in caplog.text

    def test_packed_rows_are_announced(self, dft, capsys):
        packed = ("--data.packing", "true", "--data.pack_length", "400", "--model.attn_implementation", "varlen")
        assert dft("fit", "--model.weighting", "DFT", *packed) == 0
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "varlen, proved to keep packed sequences apart" in said
        assert "rows of 400 tokens" in said
        assert re.search(r"\d\d\.\d% of their positions hold a token", said)

    def test_another_formula_under_the_same_name_is_refused(self, dft, here, capsys):
        assert dft("fit", "--model.weighting", f"{here}.Confident") == 0
        other = Path(f"{here}.py").read_text().replace("tokens.p**self.power", "1 - tokens.p**self.power")
        Path(f"{here}.py").write_text(other)
        sys.modules.pop(here)
        options = ("--model.weighting", f"{here}.Confident", "--trainer.max_epochs", "2")
        fails(lambda: dft("fit", *options), capsys, "weighting (content)", "--allow_changes '[weighting]'")

    def test_a_start_from_nothing_leaves_no_events_of_one_that_came_to_nothing(self, dft):
        """It was killed before its first checkpoint."""
        assert dft("fit", "--model.weighting", "DFT") == 0
        shutil.rmtree("run/checkpoints")
        Path("run/skipped_steps.jsonl").write_text('{"step": 0}\n')
        assert dft("fit", "--model.weighting", "DFT", "--trainer.max_steps", "2") == 0
        found = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in found.Scalars("train/nll")] == [1, 2]
        assert [event.step for event in found.Scalars("probe/nll")] == [0, 2]
        assert Path("run/skipped_steps.jsonl").read_text() == ""

    def test_logging_can_be_off(self, dft):
        assert dft("fit", "--model.weighting", "DFT", "--trainer.log_every_n_steps", "0") == 0
        assert "train/nll" not in scalars("run")

    def test_other_data_in_the_same_folder_is_refused(self, dft, capsys, tmp_path):
        assert dft("fit", "--model.weighting", "DFT") == 0
        write_jsonl(tmp_path / "others.jsonl", sums(32, seed=9))
        fails(lambda: dft("fit", "--model.weighting", "DFT", "--data.path", "others.jsonl"), capsys, "data (rows): ")

    def test_the_exported_model_starts_another_run(self, dft):
        assert dft("fit", "--model.weighting", "DFT", "--model.lora.rank", "2", "--export.merge_lora", "true") == 0
        assert (Path("run") / "export" / "adapter_config.json").exists()
        assert (
            dft("fit", "--model.weighting", "Uniform", "--model.model_name", "run/export-merged", "--run_dir", "next")
            == 0
        )

    def test_chats_of_ones_own(self, dft, tmp_path):
        rows = [{"ask": row["problem"], "say": row["solution"]} for row in sums(16)]
        write_jsonl(tmp_path / "chats.jsonl", rows)
        options = [
            "--data",
            "ChatDataModule",
            "--data.path",
            "chats.jsonl",
            "--data.prompt",
            "ask",
            "--data.completion",
            "say",
        ]
        options += ["--data.system_prompt", "Be brief.", "--data.global_batch_size", "8", "--model.weighting", "DFT"]
        assert dft("fit", *options, data=False) == 0


class TestOtherCommands:
    def test_validate_and_test(self, dft, capsys):
        assert dft("validate", "--model.weighting", "DFT") == 0
        said = capsys.readouterr().out
        assert "val/nll" in said
        assert dft("test", "--model.weighting", "DFT", "--data.test_path", "rows.jsonl") == 0
        assert "test/nll" in capsys.readouterr().out
        assert not Path("run").exists() or not any(Path("run").iterdir())
        fails(lambda: dft("validate", "--model.weighting", "DFT", "--data.val_size", "0"), capsys, "set data.val_size")
        fails(lambda: dft("test", "--model.weighting", "DFT"), capsys, "set data.test_path")

    def test_best_and_last_by_name(self, dft, capsys):
        fails(
            lambda: dft("validate", "--model.weighting", "DFT", "--ckpt_path", "best"),
            capsys,
            "run/checkpoints/best.ckpt",
        )
        assert dft("fit", "--model.weighting", "DFT") == 0
        for name in ("best", "last"):
            assert dft("validate", "--model.weighting", "DFT", "--ckpt_path", name) == 0

    def test_predict_scores_every_token(self, dft):
        import pyarrow.parquet as pq

        assert dft("predict", "--model.weighting", "DFT", "--data.val_size", "0") == 0
        table = pq.read_table("run/predictions").to_pandas()
        assert set(table.columns) == {"row", "position", "token_id", "token", "logp", "p", "entropy", "rank", "weight"}
        assert sorted(table.row.unique()) == list(range(32))
        assert (table.weight == table.p.astype("float32")).all() or (table.weight - table.p).abs().max() < 1e-6
        first = table[table.row == 3].sort_values("position")
        assert "".join(first.token) == sums(32)[3]["solution"] + "<|im_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["DFT", "ImportanceWeighted"])
def test_two_ranks_are_one(dft, here, tmp_path, model_dir, weighting):
    """Traps 1 and 14: 24 rows in steps of 9 leave ranks unequal and micro-batches empty. Float32: 2e-5 as elsewhere."""
    options = ["--model.weighting", weighting, "--data.global_batch_size", "9", "--trainer.gradient_clip_val", "0.01"]
    options += ["--data.num_workers", "1"]  # of a cached reference, too
    assert dft("fit", *options, "--run_dir", "one") == 0
    command = [sys.executable, "-m", "dft_lightning", "fit", "--config", "one/config.yaml", "--run_dir", "two"]
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run([*command, *ranks], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    one, two = scalars("one"), scalars("two")
    assert sorted(two["train/nll"]) == [1, 2, 3]
    for tag, values in one.items():
        if tag.startswith(("train/", "val/", "probe")) and "per_second" not in tag:
            for step, value in values.items():
                assert two[tag][step] == pytest.approx(value, rel=2e-5, abs=1e-7), (tag, step)
    first, second = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("one", "two")
    )
    for name, value in first.items():
        assert (second[name] - value).norm() <= 1e-5 * value.norm(), name


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "patterns"),
        [
            (["--model.weighting", "Nope"], ["'Nope' is none of ASFT, Bounded, CADFT, ", " Uniform"]),
            (["--model.weighting", "DFT", "--model.weighting.floor", "lots"], ["floor", "lots"]),
            (
                ["--model.weighting", "DFT", "--model.weighting.floor", "7"],
                ["DFT.floor is 7.0; expected a number from 0 to 1"],
            ),
            (["--model.weighting", "DFT", "--model.weighting.flor", "0.1"], ["flor"]),
            (["--model.wheighting", "DFT"], ["--model.wheighting"]),
            (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
            (["--model.weighting", "DFT", "--data.path", "nowhere.jsonl"], ["nowhere.jsonl"]),
            (["--model.weighting", "DFT", "--data", "Nonsense"], ["Nonsense"]),
            (["--model.weighting", "DFT", "--data.global_batch_size", "0"], ["data.global_batch_size is 0"]),
            (["--model.weighting", "DFT", "--model.model_name", "/no/model"], ["/no/model", "--model.model_name"]),
            (["--model.weighting", "DFT", "--model.normalize", "words"], ["normalize", "words"]),
            (["--model.weighting", "DFT", "--checkpoints.every_n_steps", "0"], ["checkpoints.every_n_steps is 0"]),
            (["--model.weighting", "DFT", "--trainer.accelerator", "gpu"], ["gpu"]),
            ([], ["model.weighting"]),
        ],
        ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
    )
    def test_one_clear_line(self, dft, capsys, options, patterns):
        fails(lambda: dft("fit", *options), capsys, *patterns)
        assert not Path("run").exists()

    def test_a_damaged_checkpoint(self, dft, capsys):
        folder = Path("run/checkpoints")
        folder.mkdir(parents=True)
        Path("run/.dft-run.json").touch()
        (folder / "last.ckpt").write_bytes(b"PK\x03\x04 half of it")
        fails(
            lambda: dft("fit", "--model.weighting", "DFT"), capsys, "cannot read checkpoint run/checkpoints/last.ckpt"
        )

    def test_a_changed_byte_of_a_checkpoint(self, dft, capsys):
        """A fit resumes from the previous one, other commands name it; where nothing else is there, it is refused."""
        options = ["--model.weighting", "DFT", "--checkpoints.every_n_steps", "1", "--export.enabled", "false"]
        assert dft("fit", *options, "--trainer.max_steps", "2") == 0
        last = Path("run/checkpoints/last.ckpt")
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        line = fails(
            lambda: main(["export", str(last), "out"]), capsys, "cannot read checkpoint", "has not the checksum"
        )
        assert "the previous one is run/checkpoints/.last.ckpt.before" in line
        with pytest.warns(UserWarning, match=r"has not the checksum.*Taking the one before it"):
            assert dft("fit", *options) == 0
        assert scalars("run")["train/objective"].keys() == {1, 2, 3}
        best = Path("run/checkpoints/best.ckpt")
        best.write_bytes(best.read_bytes()[:-1] + b"x")
        fails(
            lambda: dft("validate", "--model.weighting", "DFT", "--ckpt_path", "best"), capsys, "cannot read checkpoint"
        )

    def test_rows_that_cannot_be_used(self, dft, capsys, tmp_path):
        write_jsonl(tmp_path / "bad.jsonl", [{"problem": "x", "solution": ""}] * 9 + sums(3))
        line = fails(
            lambda: dft("fit", "--model.weighting", "DFT", "--data.path", "bad.jsonl"), capsys, "max_unusable_share"
        )
        assert "bad.jsonl" in line

    def test_an_unknown_command(self, capsys):
        fails(lambda: main(["train"]), capsys, "no command 'train'")


class TestWhatCannotBe:
    @pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_3"])
    def test_strategies_that_shard_otherwise(self, dft, capsys, name):
        call = lambda: dft("fit", "--model.weighting", "DFT", "--trainer.strategy", name)  # noqa: E731
        fails(call, capsys, f"trainer.strategy is {name}, which is not supported here; expected fsdp2")
        assert not Path("run").exists()

    def test_settings_go_with_the_short_name(self, dft, capsys):
        more = ["--trainer.strategy", "fsdp2", "--trainer.strategy.replicate", "2", "--print_config"]
        with pytest.raises(SystemExit):
            dft("fit", "--model.weighting", "DFT", *more)
        strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
        assert strategy["class_path"].endswith("FSDP2Strategy")
        assert strategy["init_args"]["replicate"] == 2

    def test_the_short_name_keeps_the_settings_of_a_file(self, dft, capsys):
        """It stood for no settings at all: what a file had said of the precision was dropped."""
        more = ["--config", str(CONFIGS / "precision" / "fsdp2-fp32-master.yaml"), "--trainer.strategy=fsdp2"]
        for option in (more, [*more[:2], "--trainer.strategy", "fsdp2"]):
            with pytest.raises(SystemExit):
                dft("fit", "--model.weighting", "DFT", *option, "--print_config")
            assert yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]["compute"] == "bfloat16"

    def test_a_run_that_is_longer_already(self, dft, capsys):
        options = ["--model.weighting", "DFT", "--trainer.max_epochs"]
        assert dft("fit", *options, "3") == 0
        fails(lambda: dft("fit", *options, "1"), capsys, "max_epochs=1")

    def test_a_run_folder_that_cannot_be_written(self, dft, capsys):
        """A file stands for it: whoever may write anywhere, as here, may not write into that."""
        Path("file").write_text("mine")
        call = lambda: dft("fit", "--model.weighting", "DFT", "--run_dir", "file/run")  # noqa: E731
        fails(call, capsys, "--run_dir file/run cannot be used", "choose another")
        assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("command", ["plan", "diagnose", "demo", "validate", "predict"])
def test_ctrl_c_is_one_line_in_every_command(command, monkeypatch, capsys):
    """A fit has its own: see test_signals.py."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dft_lightning.__main__.import_module", lambda _: SimpleNamespace(main=interrupted))
    assert main([command]) == 130
    assert capsys.readouterr().err == "dft: interrupted\n"


class TestConfigs:
    @pytest.mark.parametrize("model", sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml")))
    @pytest.mark.parametrize("weighting", ["sft", "dft", "iw_sft"])
    def test_the_papers_runs(self, capsys, model, weighting):
        files = [CONFIGS / "base.yaml", CONFIGS / f"{weighting}.yaml", CONFIGS / "models" / f"{model}.yaml"]
        with pytest.raises(SystemExit) as leaving:
            main(["fit", *(option for file in files for option in ("--config", str(file))), "--print_config"])
        assert leaving.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        data, optimizer = config["data"]["init_args"], config["model"]["optimizer"]
        rate = 2e-5 if model == "llama-3.1-8b" else 5e-5
        assert optimizer["class_path"] == "torch.optim.AdamW"
        for key, value in {"lr": rate, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01}.items():
            assert optimizer["init_args"][key] == value
        assert (config["model"]["lr_schedule"], config["model"]["warmup_ratio"]) == ("cosine", 0.1)
        assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (1, 1.0)
        assert config["trainer"]["precision"] == "bf16-true"
        assert (data["num_samples"] // data["global_batch_size"], data["drop_last"], data["max_length"]) == (
            390,
            True,
            2048,
        )
        assert (config["data"]["class_path"], data["end_of_response"]) == (
            "dft_lightning.data.NuminaMathDataModule",
            "eos",
        )
        assert config["export"]["stop_tokens"]

    @pytest.mark.parametrize("file", BLOCKS)
    def test_the_others_parse(self, capsys, file):
        base = ["--config", str(CONFIGS / "base.yaml"), "--config", str(CONFIGS / "dft.yaml")]
        more = ["--model.model_name", "x", "--config", str(CONFIGS / f"{file}.yaml"), "--print_config"]
        with pytest.raises(SystemExit) as leaving:
            main(["fit", *base, *more])
        assert leaving.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["model"]["quantization"] == ("nf4" if file == "qlora" else None)
        if file in ("lora", "qlora"):
            assert config["model"]["lora"] == asdict(LoRA(rank=8, alpha=16, dropout=0.0, target_modules="all-linear"))
        if file == "packing":
            assert config["data"]["init_args"]["packing"] == "padding_free"
            assert config["data"]["init_args"]["num_samples"] == 100000
        if file == "fsdp2":
            assert config["trainer"]["strategy"]["class_path"] == "dft_lightning.sharding.FSDP2Strategy"
            assert config["checkpoints"]["sharded"]
        if file == "demo":
            assert config["model"]["model_name"] == NAME


class TestHelp:
    def test_the_overview_names_every_command(self, capsys):
        assert main([]) == main(["--help"]) == 0
        said = capsys.readouterr().out
        assert all(command in said for command in ("fit", "validate", "test", "predict", "demo"))
        assert main(["--version"]) == 0

    def test_a_weighting_explains_itself(self, capsys):
        with pytest.raises(SystemExit):
            main(["fit", "--model.weighting.help", "DFT"])
        said = capsys.readouterr().out
        assert "Dynamic Fine-Tuning" in said
        assert "smallest weight" in said

    @pytest.mark.slow
    def test_it_comes_quickly(self):
        """The overview within 1 s; a command's options within 2 s of what importing lightning alone takes.

        Of the processor's time: the machine may have other work.
        """

        def seconds(*code):
            times = []
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *code], check=True, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            return min(times)

        assert seconds("-m", "dft_lightning", "--help") < 1.0
        assert seconds("-m", "dft_lightning", "fit", "--help") < seconds("-c", "import lightning.pytorch") + 2.0

    def test_parsing_imports_nothing_heavy_of_ours(self):
        code = (
            "import sys, lightning.pytorch.cli; before = set(sys.modules)\n"
            "import dft_lightning.cli\n"
            "heavy = {'datasets', 'peft', 'tensorboard', 'matplotlib.pyplot', 'pandas'} & (set(sys.modules) - before)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
