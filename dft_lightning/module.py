"""`FineTuner`: one training step, whatever a token is worth."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning import resume
from dft_lightning.errors import UserError
from dft_lightning.metrics import TokenMeans, positions_of, token_means, token_sums, units_of
from dft_lightning.models import LoRA, ModelSource, Precision, WeightedLM, add_lora, load_model, load_tokenizer
from dft_lightning.nonfinite import SkippedSteps
from dft_lightning.normalizer import Normalize, scale_gradients, token_factor, units
from dft_lightning.optimization import papers_adamw, restore_settings, schedule, settings
from dft_lightning.reference import prepare_reference
from dft_lightning.step_weights import by_row, weigh_together
from dft_lightning.weighting import TokenStats, TokenWeighting, Uniform
from dft_lightning.weighting.proof import prove
from dft_lightning.weighting.spec import from_spec, to_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.batch import Batch

Reference = Literal["auto", "cache", "adapter_off"]


class FineTuner(pl.LightningModule):
    """Fine-tunes a causal language model by −Σ sg(w_t)·log π(y_t), where `weighting` says what each token is worth.

    Args:
        model_name: a name on the hub, a local folder, or "smollm2-135m-instruct" for the embedded model.
        weighting: what each token is worth: Uniform (SFT), DFT, ImportanceWeighted, or a class of your own.
        normalize: divide a step's loss by its supervised tokens, its sequences, or as the DFT paper's code does, by
            micro-batches (the gradient then depends on the micro-batch size).
        optimizer: any torch optimizer; the default is the DFT paper's.
        lr_schedule: name of a schedule of transformers: cosine, linear, constant_with_warmup, …
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        dtype: of the weights; auto means that of trainer.precision where it ends in "-true", else float32.
        attn_implementation: sdpa, eager, flash_attention_2, …; by default what transformers chooses.
        gradient_checkpointing: recompute activations in the backward pass: less memory, up to a third more time.
        lora: train low-rank adapters instead of all weights, e.g. --model.lora.rank 8.
        reference: where the reference log-probabilities of a weighting come from: a cache on disk, computed once from
            the initial model, or the model with its adapter off. auto takes the adapter where there is one.
        tokenizer_name: where the tokenizer comes from, if not from the model.
        chat_template: replaces the tokenizer's: llama3, deepseek_math, chatml, or a .jinja file.
        chunk_rows: tokens whose logits the loss holds at a time; by default as many as fit 100 MiB (CPU), 2 GiB (GPU).
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many in a row end the run.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model; only for sources you trust.
    """

    def __init__(
        self,
        model_name: str,
        weighting: TokenWeighting,
        normalize: Normalize = "tokens",
        optimizer: OptimizerCallable = papers_adamw,
        lr_schedule: str = "cosine",
        warmup_ratio: float = 0.1,
        dtype: Precision = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        reference: Reference = "auto",
        tokenizer_name: str | None = None,
        chat_template: str | None = None,
        chunk_rows: int | None = None,
        max_skipped_steps: int = 20,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in {"self", "optimizer", "__class__"}}
        super().__init__()
        # A checkpoint holds plain data, and is loaded without pickle: a weighting and LoRA come back as dictionaries.
        self.weighting: TokenWeighting = _revived(weighting, from_spec)
        self.lora: LoRA | None = _revived(lora, lambda fields: LoRA(**fields))
        self.save_hyperparameters(
            given | {"weighting": to_spec(self.weighting), "lora": asdict(self.lora) if self.lora else None}
        )
        self.optimizer, self.lr_schedule, self.warmup_ratio = optimizer, lr_schedule, warmup_ratio
        self.normalize, self.dtype_choice, self.chat_template = normalize, dtype, chat_template
        self.source = ModelSource(model_name, torch.float32, attn_implementation, revision, trust_remote_code)
        self.tokenizer_name, self.gradient_checkpointing, self.reference = (
            tokenizer_name,
            gradient_checkpointing,
            reference,
        )
        self.network: WeightedLM | None = None
        self.is_initial = False
        """Whether the weights are those that were loaded: not trained yet, and no checkpoint's."""
        self.means = TokenMeans()
        self.chunk_rows = chunk_rows
        self.skipped = SkippedSteps(max_skipped_steps)
        self.allow_changes: frozenset[str] = frozenset()
        """What may differ from the checkpoint that a run goes on from: see `resume.Change`."""
        self.reference_weights: str | None = None
        """sha256 of the model that the weighting compares with."""
        self.wanted: frozenset[str] = frozenset()
        """Statistics of the distribution that a callback wants of the training tokens."""
        self.trained_on: TokenStats | None = None
        """The supervised tokens of the micro-batch just trained on, for callbacks."""
        self._then: Mapping[str, Any] | None = None  # facts of the checkpoint that the run goes on from
        self._sums: Tensor | None = None
        self._norm: Tensor | None = None
        self._known: list[Tensor] = []  # weights of the step's micro-batches, for a weighting of step scope
        self._validated: list[tuple[TokenStats, Tensor | None, Tensor, int]] = []
        self._step_began = perf_counter()
        _refuse(self)

    @property
    def model(self) -> Any:
        """The transformers model, or the peft model around it."""
        return self._network.model

    @property
    def _network(self) -> WeightedLM:
        assert self.network is not None, "configure_model has not run"
        return self.network

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with the chat template in force."""
        source = (
            self.source
            if self.tokenizer_name is None
            else replace(self.source, name=self.tokenizer_name, revision=None)
        )
        return load_tokenizer(source, self.chat_template)

    @property
    def adapter_is_reference(self) -> bool:
        """Whether the model with its adapter off serves as the reference."""
        return "ref_logp" in self.weighting.needs and self.lora is not None and self.reference != "cache"

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.network is not None:
            return
        self.source.dtype = self._weights_dtype()
        self.network = WeightedLM(self.initial_model())
        self.is_initial = True
        if self.gradient_checkpointing:
            self._network.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def initial_model(self) -> Any:
        """The model as it is before any training, adapters included."""
        model = load_model(self.source)
        return model if self.lora is None else add_lora(model, self.lora)

    def _weights_dtype(self) -> torch.dtype:
        if self.dtype_choice != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype_choice))
        precision = str(self.trainer.precision) if self._trainer is not None else "32-true"
        true = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
        return true.get(precision, torch.float32)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the run has no end: set trainer.max_steps, or trainer.max_epochs to a positive number")
        return int(steps)

    @property
    def progress(self) -> float:
        """Share of training done, 0 to 1."""
        return min(self.trainer.global_step / max(self.total_steps, 1), 1.0) if self.trainer.state.fn == "fit" else 1.0

    def score(
        self, batch: "Batch", wanted: frozenset[str] = frozenset(), weight: Tensor | None = None
    ) -> tuple[Tensor, TokenStats]:
        """The loss of a micro-batch (a sum) and its tokens' statistics, weights included.

        A weighting of step scope needs the `weight` (N,) of each token; see `score_together`.
        """
        loss, tokens = self._network(
            batch,
            self.weighting,
            factor=token_factor(self.normalize, batch.sequence),
            progress=self.progress,
            wanted=wanted,
            ref_logp=self._ref_logp(batch),
            weight=weight,
            chunk_rows=self.chunk_rows,
        )
        return loss, tokens

    @torch.no_grad()
    def score_together(self, batches: "list[Batch]", wanted: frozenset[str] = frozenset()) -> list[TokenStats]:
        """The tokens of some micro-batches, weighted as if they were all of a step; all ranks have to call this."""
        moved = [batch.to(self.device) for batch in batches]
        if self.weighting.scope != "step":
            return [self.score(batch, wanted)[1] for batch in moved]
        tokens = [self._unweighted(batch, wanted) for batch in moved]
        return [replace(part, weight=w) for part, w in zip(tokens, self._weigh_together(tokens), strict=True)]

    @torch.no_grad()
    def _unweighted(self, batch: "Batch", wanted: frozenset[str] = frozenset()) -> TokenStats:
        """What a weighting of step scope needs to know of a micro-batch, with rows in place of sequences."""
        _, tokens = self._network(
            batch,
            Uniform(),
            progress=self.progress,
            wanted=wanted | self.weighting.needs,
            ref_logp=self._ref_logp(batch),
            chunk_rows=self.chunk_rows,
        )
        return by_row(replace(tokens, weight=None), batch)

    def _weigh_together(self, parts: list[TokenStats]) -> list[Tensor]:
        return weigh_together(self.weighting, parts, self.trainer.world_size)

    def _ref_logp(self, batch: "Batch") -> Tensor | None:
        if "ref_logp" not in self.weighting.needs:
            return None
        return self._network.logp(batch, adapter=False) if self.adapter_is_reference else batch.ref_logp

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """One micro-batch: its loss is a sum, divided in `on_before_optimizer_step`."""
        step, number = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        if self.weighting.scope == "step" and number == 0:
            self._known = self._weights_of_step(step)
        self._seed(number)
        loss, tokens = self.score(batch, self.wanted, self._known[number] if self._known else None)
        self.trained_on = tokens
        self.skipped.see(batch, tokens)
        sums = token_sums(loss, units(self.normalize, batch.sequence), tokens, batch.tokens)
        self._sums = sums if self._sums is None else self._sums + sums
        return loss

    def _weights_of_step(self, step: int) -> list[Tensor]:
        """The weights of each micro-batch of the epoch's step, by a pass with the dropout of the gradient pass."""
        data, parts = cast("ChatDataModule", self.trainer.datamodule), []  # type: ignore[attr-defined]
        for number, batch in enumerate(data.step(self.trainer.current_epoch, step)):
            self._seed(number)
            parts.append(self._unweighted(batch.to(self.device)))
        return self._weigh_together(parts)

    def _seed(self, micro_batch: int) -> None:
        """Dropout follows from seed, step, micro-batch and rank, so that it is the same after a restart."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        facts = [seed, self.trainer.global_step, micro_batch, self.trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(facts).generate_state(1)[0]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise the gradient by the whole step.

        Lightning has divided each loss by the accumulation and averages gradients over ranks; both are undone here.
        """
        assert self._sums is not None
        self.is_initial = False
        self._sums = cast(Tensor, self.trainer.strategy.reduce(self._sums, reduce_op="sum"))
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / units_of(self._sums).clamp(min=1)
        scale_gradients(list(self._network.parameters()), factor)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip what `on_before_optimizer_step` has normalised; take away a gradient that is not finite.

        An optimizer leaves a parameter without a gradient, and its own state of it, as they are.
        """
        parameters = [parameter for parameter in self._network.parameters() if parameter.grad is not None]
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        self._norm = torch.nn.utils.clip_grad_norm_(
            parameters, gradient_clip_val if by_norm and gradient_clip_val else float("inf")
        )
        if gradient_clip_val and not by_norm:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        assert self._sums is not None
        finite = bool(torch.isfinite(self._norm) & torch.isfinite(token_means(self._sums)["objective"]))
        facts = {} if finite else {"norm": self._norm.item(), "loss": token_means(self._sums)["objective"].item()}
        self.skipped.judge(finite, self.trainer, facts)
        if not finite:
            for parameter in parameters:
                parameter.grad = None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, and what is logged of it, before any checkpoint of it can be written."""
        optimizer.step(closure=optimizer_closure)
        assert self._sums is not None
        assert self._norm is not None
        now = perf_counter()
        values = {name: value for name, value in token_means(self._sums).items() if name != "top1"}
        values["tokens_per_second"] = positions_of(self._sums) / (now - self._step_began)
        values["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        values["grad_norm"] = self._norm.double()
        if self.skipped.this_one:
            values = {name: value for name, value in values.items() if bool(torch.isfinite(value))}
        values["skipped_steps"] = torch.tensor(float(self.skipped.total))
        self._step_began, self._sums = now, None
        step = self.trainer.global_step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where Lightning starts
        due = step % every == 0 or step == self.total_steps
        self._record("train", values, step if due else None, {"objective", "nll", "tokens_per_second"})

    def _record(self, stage: str, values: Mapping[str, Tensor], step: int | None, on_bar: set[str]) -> None:
        """Values for callbacks and the progress bar; and, at `step`, for the loggers: optimizer steps done by then."""
        fitting = self.trainer.state.fn == "fit"
        for name, value in values.items():  # equal on all ranks: summed over them before
            self.log(f"{stage}/{name}", value.to(torch.float32), prog_bar=name in on_bar, logger=not fitting)
        if step is not None and fitting:
            for logger in self.loggers:
                logger.log_metrics({f"{stage}/{name}": float(value) for name, value in values.items()}, step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The schedule waits while a step is skipped."""
        if not self.skipped.this_one:
            scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: "Batch", batch_idx: int) -> None:
        """End the run where nothing can be learnt any more; callbacks have saved it by now."""
        if self.skipped.too_many:
            raise UserError(
                f"stopped at step {self.trainer.global_step}: {self.skipped.in_a_row} steps in a row without a finite "
                "loss and gradient (model.max_skipped_steps). Their rows are in skipped_steps.jsonl, the state in "
                "checkpoints/stopped.ckpt; last.ckpt is from before. Lower the learning rate, or look at those rows"
            )

    def on_fit_start(self) -> None:
        """Have the reference log-probabilities at hand, where the weighting compares with the initial model."""
        if (self.trainer.gradient_clip_val or 0.0) < 0.0:
            raise UserError(f"trainer.gradient_clip_val is {self.trainer.gradient_clip_val}; expected 0 or more")
        data = getattr(self.trainer, "datamodule", None)
        if self.weighting.scope == "step" and not hasattr(data, "step"):
            raise UserError(
                f"{type(self.weighting).__name__} looks at whole optimizer steps: train with a ChatDataModule"
            )
        if data is not None and getattr(data, "is_packed", False):
            with self.trainer.precision_plugin.forward_context():
                self._network.check_borders()
        self._prepare_reference(["train", "val"])

    def on_train_start(self) -> None:
        """After a resume: the run's own learning rate and other settings are in force, and what has changed is said."""
        if self._then is None:
            return
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        changed = restore_settings(self.trainer.optimizers[0], cast(Any, scheduler), self._settings)
        if self._then["total_steps"] != self.total_steps:
            changed.append(f"steps {self._then['total_steps']} → {self.total_steps}")
        if changed:
            rank_zero_info(f"Going on with other settings than the checkpoint's: {', '.join(changed)}")

    def on_validation_start(self) -> None:
        """As for training, in `dft validate`."""
        if self.trainer.state.fn == "validate":
            self._prepare_reference(["val"])

    def on_test_start(self) -> None:
        """As for training."""
        self._prepare_reference(["test"])

    def on_predict_start(self) -> None:
        """As for training."""
        self._prepare_reference(["train"])

    def set_reference(self, weights: str) -> None:
        """Take note of the sha256 of the reference model; refused where the run had another one before."""
        then = None if self._then is None else self._then["reference"]
        if then is not None:
            resume.refuse(
                resume.changes({"model (reference weights)": then}, {"model (reference weights)": weights}),
                self.allow_changes,
            )
        self.reference_weights = weights

    def _prepare_reference(self, stages: list[str]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            prepare_reference(self, data, stages)

    def on_train_epoch_start(self) -> None:
        """Start the clock of tokens/s."""
        self._step_began = perf_counter()

    def on_validation_end(self) -> None:
        """Keep validation out of the next step's tokens/s."""
        self._step_began = perf_counter()

    def validation_step(self, batch: "Batch", batch_idx: int) -> None:
        """Add a batch to the means over the whole validation set."""
        if self.weighting.scope == "step":  # the set is the step
            tokens, factor = self._unweighted(batch, frozenset({"rank"})), token_factor(self.normalize, batch.sequence)
            self._validated.append((tokens, factor, units(self.normalize, batch.sequence), batch.tokens))
            return
        loss, tokens = self.score(batch, frozenset({"rank"}))
        self.means.update(token_sums(loss, units(self.normalize, batch.sequence), tokens, batch.tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        self._log_means("val")

    def test_step(self, batch: "Batch", batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        held, self._validated = self._validated, []
        weights = self._weigh_together([tokens for tokens, *_ in held]) if held else []
        for (tokens, factor, count, positions), weight in zip(held, weights, strict=True):
            objective = -(weight * tokens.logp * (1.0 if factor is None else factor)).sum()
            self.means.update(token_sums(objective, count, replace(tokens, weight=weight), positions))
        self._record(stage, self.means.compute(), self.trainer.global_step, {"nll", "p_mean"})
        self.means.reset()

    def predict_step(self, batch: "Batch", batch_idx: int) -> tuple["Batch", TokenStats]:
        """The batch and the statistics of its tokens; weights of step scope are not known here, and NaN."""
        wanted = frozenset({"entropy", "rank"})
        if self.weighting.scope == "step":
            tokens = self._unweighted(batch, wanted)
            return batch, replace(tokens, sequence=batch.sequence, weight=torch.full_like(tokens.logp, float("nan")))
        return batch, self.score(batch, wanted)[1]

    def configure_optimizers(self) -> Any:
        """The optimizer over everything trainable, and the schedule, a step at a time."""
        optimizer = self.optimizer([parameter for parameter in self._network.parameters() if parameter.requires_grad])
        if self._then is not None:
            kind = {"optimizer": type(optimizer).__qualname__}
            resume.refuse(resume.changes({"optimizer": self._then["optimizer"]}, kind))
        total = self.total_steps
        scheduler = schedule(optimizer, self.lr_schedule, int(self.warmup_ratio * total), total)
        self._settings = settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what makes this run what it is."""
        if self.trainer.optimizers:
            checkpoint[resume.KEY] = resume.facts_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on as another run; see `allow_changes`."""
        self.is_initial = False
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if resume.KEY not in checkpoint:
            raise UserError("the checkpoint was not written by a training run of dft-lightning: start a new run")
        facts = checkpoint[resume.KEY]
        now = resume.options_of(self.hparams) | resume.contents_of(self)
        resume.refuse(resume.changes(facts["options"] | facts["contents"], now), self.allow_changes)
        resume.rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)
        self.skipped.load(facts["skipped"])
        self._then = facts


def _revived(value: Any, build: Callable[[Mapping[str, Any]], Any]) -> Any:
    return build(value) if isinstance(value, Mapping) else value


def _refuse(module: FineTuner) -> None:
    """What would be ignored or computed wrongly is refused before anything is loaded."""
    name = type(module.weighting).__name__
    try:
        prove(module.weighting)
    except ValueError as error:
        raise UserError(f"weighting refused: {error}") from error
    if unknown := set(module.weighting.needs) & {"old_logp", "reward", "data_weight"}:
        raise UserError(f"{name} needs {sorted(unknown)}, which no data set here provides yet")
    if module.reference == "adapter_off" and module.lora is None:
        raise UserError("model.reference is 'adapter_off', but there is no adapter: set model.lora, or use 'cache'")
    for option, value in (("chunk_rows", module.chunk_rows), ("max_skipped_steps", module.skipped.limit)):
        if value is not None and value < 1:
            raise UserError(f"model.{option} is {value}; expected 1 or more")
    if not 0.0 <= module.warmup_ratio < 1.0:
        raise UserError(f"model.warmup_ratio is {module.warmup_ratio}; expected a share from 0 to less than 1")
