"""`FineTuner`: one training step, whatever a token is worth."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.metrics import TokenMeans, positions_of, token_means, token_sums, units_of
from dft_lightning.models import LoRA, ModelSource, Precision, WeightedLM, add_lora, load_model, load_tokenizer
from dft_lightning.normalizer import Normalize, scale_gradients, token_factor, units
from dft_lightning.reference import prepare_reference
from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.proof import prove
from dft_lightning.weighting.spec import from_spec, to_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.batch import Batch

Reference = Literal["auto", "cache", "adapter_off"]


#: The optimizer of the DFT paper's runs (arXiv 2508.05629).
PAPERS_ADAMW: dict[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
papers_adamw = partial(torch.optim.AdamW, **PAPERS_ADAMW)


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
        self.wanted: frozenset[str] = frozenset()
        """Statistics of the distribution that a callback wants of the training tokens."""
        self.trained_on: TokenStats | None = None
        """The supervised tokens of the micro-batch just trained on, for callbacks."""
        self._sums: Tensor | None = None
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

    def score(self, batch: "Batch", wanted: frozenset[str] = frozenset()) -> tuple[Tensor, TokenStats]:
        """The loss of a micro-batch (a sum) and its tokens' statistics, weights included."""
        loss, tokens = self._network(
            batch,
            self.weighting,
            factor=token_factor(self.normalize, batch.sequence),
            progress=self.progress,
            wanted=wanted,
            ref_logp=self._ref_logp(batch),
        )
        return loss, tokens

    def _ref_logp(self, batch: "Batch") -> Tensor | None:
        if "ref_logp" not in self.weighting.needs:
            return None
        return self._network.logp(batch, adapter=False) if self.adapter_is_reference else batch.ref_logp

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """One micro-batch: its loss is a sum, divided in `on_before_optimizer_step`."""
        loss, tokens = self.score(batch, self.wanted)
        self.trained_on = tokens
        sums = token_sums(loss, units(self.normalize, batch.sequence), tokens, batch.tokens)
        self._sums = sums if self._sums is None else self._sums + sums
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise the gradient by the whole step, and log the step.

        Lightning has divided each loss by the accumulation and averages gradients over ranks; both are undone here.
        """
        assert self._sums is not None
        self.is_initial = False
        sums = cast(Tensor, self.trainer.strategy.reduce(self._sums, reduce_op="sum"))
        self._sums = None
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / units_of(sums).clamp(min=1)
        scale_gradients(list(self._network.parameters()), factor)
        now = perf_counter()
        values = {name: value for name, value in token_means(sums).items() if name != "top1"}
        values["tokens_per_second"] = positions_of(sums) / (now - self._step_began)
        values["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        self._step_began = now
        on_bar = {"objective", "nll", "tokens_per_second"}
        for name, value in values.items():
            self.log(f"train/{name}", value.to(torch.float32), prog_bar=name in on_bar)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip what `on_before_optimizer_step` has normalised, and log the norm before clipping."""
        parameters = [parameter for parameter in self._network.parameters() if parameter.grad is not None]
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, gradient_clip_val if by_norm and gradient_clip_val else float("inf")
        )
        if gradient_clip_val and not by_norm:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        self.log("train/grad_norm", norm.to(torch.float32))
        if self.trainer.precision != "16-mixed" and not torch.isfinite(norm):  # there the scaler skips such a step
            raise UserError(
                f"the gradient of step {self.trainer.global_step} is not finite (norm {norm.item()}): stopped before "
                "it is applied; checkpoints hold the state before. Lower the learning rate, or look at that step's rows"
            )

    def on_fit_start(self) -> None:
        """Have the reference log-probabilities at hand, where the weighting compares with the initial model."""
        if (self.trainer.gradient_clip_val or 0.0) < 0.0:
            raise UserError(f"trainer.gradient_clip_val is {self.trainer.gradient_clip_val}; expected 0 or more")
        self._prepare_reference(["train", "val"])

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
        for name, value in self.means.compute().items():
            on_bar = name in {"nll", "p_mean"}
            self.log(f"{stage}/{name}", value.to(torch.float32), prog_bar=on_bar, sync_dist=True)  # equal on all ranks
        self.means.reset()

    def predict_step(self, batch: "Batch", batch_idx: int) -> tuple["Batch", TokenStats]:
        """The batch and the statistics of its tokens."""
        return batch, self.score(batch, frozenset({"entropy", "rank"}))[1]

    def configure_optimizers(self) -> Any:
        """The optimizer over everything trainable, and the schedule, a step at a time."""
        from transformers import get_scheduler

        optimizer = self.optimizer([parameter for parameter in self._network.parameters() if parameter.requires_grad])
        total = self.total_steps
        try:
            scheduler = get_scheduler(
                self.lr_schedule, optimizer, num_warmup_steps=int(self.warmup_ratio * total), num_training_steps=total
            )
        except ValueError as error:
            raise UserError(f"model.lr_schedule is {self.lr_schedule!r}: {error}") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where the run's options differ from the checkpoint's; the run's are in force."""
        self.is_initial = False
        then, now = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
        changed = [f"{key}: {then[key]!r} → {now[key]!r}" for key in now if key in then and then[key] != now[key]]
        if changed:
            pl.utilities.rank_zero_warn(
                "options differ from the checkpoint's; the new ones hold — " + "; ".join(changed)
            )


def _revived(value: Any, build: Callable[[Mapping[str, Any]], Any]) -> Any:
    return build(value) if isinstance(value, Mapping) else value


def _refuse(module: FineTuner) -> None:
    """What would be ignored or computed wrongly is refused before anything is loaded."""
    name = type(module.weighting).__name__
    try:
        prove(module.weighting)
    except ValueError as error:
        raise UserError(f"weighting refused: {error}") from error
    if module.weighting.scope == "step":
        raise UserError(f"{name} has scope 'step': weights that look at a whole optimizer step are not supported yet")
    if unknown := set(module.weighting.needs) & {"old_logp", "reward", "data_weight"}:
        raise UserError(f"{name} needs {sorted(unknown)}, which no data set here provides yet")
    if module.reference == "adapter_off" and module.lora is None:
        raise UserError("model.reference is 'adapter_off', but there is no adapter: set model.lora, or use 'cache'")
    if not 0.0 <= module.warmup_ratio < 1.0:
        raise UserError(f"model.warmup_ratio is {module.warmup_ratio}; expected a share from 0 to less than 1")
