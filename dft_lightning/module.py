"""`FineTuner`: one training step, whatever a token is worth."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning import resume
from dft_lightning.adapters import prepare_adapters
from dft_lightning.averaging import keep_averages, take_current
from dft_lightning.compilation import compile_layers, refuse_changing_shapes, rehearse
from dft_lightning.data_weights import check_data_weights
from dft_lightning.errors import UserError
from dft_lightning.models import LoRA, ModelSource, Precision
from dft_lightning.normalizer import Normalize
from dft_lightning.old_policy import OldPolicy, window_of
from dft_lightning.optimization import papers_adamw, restore_settings, schedule, settings
from dft_lightning.quantization import Quantization
from dft_lightning.recomputation import Recomputation, recompute
from dft_lightning.refusals import refuse, refuse_fused_scaling, refuse_parts
from dft_lightning.scoring import Reference, WeightedModule
from dft_lightning.step import StepInTheMaking
from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.spec import from_spec, to_spec

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.batch import Batch


class FineTuner(WeightedModule):
    """Fine-tunes a causal language model by −Σ sg(w_t)·log π(y_t), where `weighting` says what each token is worth.

    Args:
        model_name: a name on the hub, a local folder, or "smollm2-135m-instruct" for the embedded model.
        weighting: what each token is worth: Uniform (SFT), DFT, another of `dft weightings`, or a class of your own.
        normalize: divide a step's loss by its supervised tokens, its sequences, or as the DFT paper's code does, by
            micro-batches (the gradient then depends on the micro-batch size).
        optimizer: any torch optimizer; the default is the DFT paper's.
        lr_schedule: name of a schedule of transformers: cosine, linear, constant_with_warmup, …
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        dtype: of the weights; auto means that of trainer.precision where it ends in "-true", else float32.
        attn_implementation: sdpa, eager, varlen (ours, for packed rows), flash_attention_2, …; by default what
            transformers chooses.
        activation_checkpointing: what the backward pass computes again in place of keeping it. selective: all but
            matrix products and attention; full: whole layers, up to a third more time; auto: the least that fits.
        compile: compile the decoder's layers; rows have to be packed (data.packing true), so that shapes are fixed.
        lora: train low-rank adapters instead of all weights, e.g. --model.lora.rank 8.
        quantization: hold what is not trained in 4 bits ("nf4"), under LoRA alone; needs bitsandbytes.
        reference: what a weighting compares with, the initial model: a cache on disk of its log-probabilities, computed
            once; the model with its adapter off; or a frozen copy in memory. auto takes the adapter where there is one,
            else the cache, or the copy where distributions over the vocabulary are wanted.
        tokenizer_name: where the tokenizer comes from, if not from the model.
        chat_template: replaces the tokenizer's: llama3, deepseek_math, chatml, or a .jinja file.
        chunk_rows: tokens whose logits the loss holds at a time; by default as many as fit 200 MiB (CPU), 2 GiB (GPU).
        logits: in what the loss holds logits before the softmax, which is computed in float32 either way. bfloat16, for
            bfloat16 products, is faster on a CPU, and as exact as plain bfloat16 training.
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
        activation_checkpointing: Recomputation | Literal["auto"] = "none",
        compile: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        reference: Reference = "auto",
        tokenizer_name: str | None = None,
        chat_template: str | None = None,
        chunk_rows: int | None = None,
        logits: Literal["float32", "bfloat16"] = "float32",
        max_skipped_steps: int = 20,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in {"self", "optimizer", "__class__"}}
        super().__init__()
        # A checkpoint holds plain data, and is loaded without pickle: a weighting and LoRA come back as dictionaries.
        self.weighting = from_spec(weighting) if isinstance(weighting, Mapping) else weighting
        self.lora = LoRA(**lora) if isinstance(lora, Mapping) else lora
        self.save_hyperparameters(
            given | {"weighting": to_spec(self.weighting), "lora": asdict(self.lora) if self.lora else None}
        )
        self.optimizer, self.lr_schedule, self.warmup_ratio = optimizer, lr_schedule, warmup_ratio
        self.source = ModelSource(model_name, torch.float32, attn_implementation, revision, trust_remote_code)
        self.source.quantization, self.dtype_choice, self.normalize = quantization, dtype, normalize
        self.tokenizer_name, self.chat_template = tokenizer_name, chat_template
        self.reference, self.chunk_rows, self.logits = reference, chunk_rows, logits
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile
        self.step = StepInTheMaking(normalize, self.weighting.divisor, max_skipped_steps)
        self.wanted: frozenset[str] = frozenset()
        """Statistics of the distribution that a callback wants of the training tokens."""
        window = window_of(self.weighting)
        self.old_policy = OldPolicy(window) if window else None
        self.trained_on: TokenStats | None = None
        """The supervised tokens of the micro-batch just trained on, for callbacks."""
        self._layers_ready = False
        self.recomputation: Recomputation = "none"
        """What the backward pass computes again, once that is chosen."""
        self._known: list[Tensor] = []  # weights of the step's micro-batches, for a weighting of step scope
        refuse(self)

    def setup(self, stage: str) -> None:
        """Refuse data that do not go with the weighting; compiled layers want batches of one shape from the start."""
        data: Any = getattr(self.trainer, "datamodule", None)
        check_data_weights(self.weighting, data, stage)
        if self.old_policy is not None:
            self.old_policy.forget()  # of an earlier fit; that of a checkpoint comes after this
        if stage == "fit" and self.compile_layers:
            refuse_changing_shapes(data)
        if stage == "fit" and hasattr(data, "fixed_shape"):
            data.fixed_shape = self.compile_layers

    def training_step(self, batch: "Batch", batch_idx: int) -> Tensor:
        """One micro-batch: its loss is a sum, divided in `on_before_optimizer_step`."""
        step, number = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        if self.old_policy is not None and number == 0 and self.old_policy.is_due(self.trainer.global_step):
            self._begin_window(self.old_policy, step)
        if self.weighting.scope == "step" and number == 0:
            self._known = self._weights_of_step(step)
        self._seed(number)
        loss, tokens = self.score(batch, self.wanted, self._known[number] if self._known else None)
        self.trained_on = tokens
        self.step.add(loss, batch, tokens)
        return loss

    def _recomputation(self, data: "ChatDataModule | None") -> Recomputation:
        """What is in force, where it is to be found out too."""
        if self.activation_checkpointing != "auto":
            return self.activation_checkpointing
        from dft_lightning.planning.automatic import choose

        if data is None:
            raise UserError("model.activation_checkpointing auto goes by micro-batches: train with a data module")
        return choose(self, data)

    def _weights_of_step(self, step: int) -> list[Tensor]:
        """The weights of each micro-batch of the epoch's step, by a pass with the dropout of the gradient pass."""
        data, parts = cast("ChatDataModule", self.trainer.datamodule), []  # type: ignore[attr-defined]
        for number, batch in enumerate(data.step(self.trainer.current_epoch, step)):
            self._seed(number)
            parts.append(self._unweighted(self._moved(batch)))
        return self._weigh_together(parts)

    def _begin_window(self, old: OldPolicy, step: int) -> None:
        """Have the policy, as it is now, look at what the window's steps will train on."""
        data, epoch = cast("ChatDataModule", self.trainer.datamodule), self.trainer.current_epoch  # type: ignore[attr-defined]
        steps = old.steps(self.trainer.global_step, self.total_steps)
        places = [divmod(step + further, data.sampler().steps) for further in range(len(steps))]
        batches = (batch for epochs, number in places for batch in data.step(epoch + epochs, number))
        found = ((batch, self._network.logp(self._moved(batch), **self._head_options)) for batch in batches)
        old.begin(steps, found, self.trainer.world_size)

    @property
    def seed(self) -> int:
        """That of `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def _seed(self, micro_batch: int) -> None:
        """Dropout follows from seed, step, micro-batch and rank, so that it is the same after a restart."""
        facts = [self.seed, self.trainer.global_step, micro_batch, self.trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(facts).generate_state(1)[0]))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalise the gradient by the whole step."""
        self.is_initial = False
        self.step.normalise(self.trainer, self._network.parameters())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip what `on_before_optimizer_step` has normalised; a gradient that is not finite is taken away."""
        self.step.clip(self.trainer, self._network.parameters(), gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """The step, and what is logged of it, before any checkpoint of it can be written."""
        optimizer.step(closure=optimizer_closure)
        done = self.trainer.global_step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where Lightning starts
        due = every and (done % every == 0 or done == self.total_steps)
        self._record("train", self.step.close(optimizer), done if due else None, {"objective", "nll"})

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The schedule waits while a step is skipped."""
        if not self.step.skipped.this_one:
            scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: "Batch", batch_idx: int) -> None:
        """End the run where nothing can be learnt any more; callbacks have saved it by now."""
        if self.step.skipped.too_many:
            raise UserError(
                f"stopped at step {self.trainer.global_step}: {self.step.skipped.in_a_row} steps in a row without a "
                "finite loss and gradient (model.max_skipped_steps). Their rows are in skipped_steps.jsonl, the state "
                "in checkpoints/stopped.ckpt; a last.ckpt is from before. Lower the learning rate, or look at the rows"
            )

    def on_fit_start(self) -> None:
        """Have the reference log-probabilities at hand, where the weighting compares with the initial model."""
        if (self.trainer.gradient_clip_val or 0.0) < 0.0:
            raise UserError(f"trainer.gradient_clip_val is {self.trainer.gradient_clip_val}; expected 0 or more")
        data = getattr(self.trainer, "datamodule", None)
        ahead = self.weighting.scope == "step" or self.old_policy is not None
        if ahead and not hasattr(data, "step"):
            raise UserError(
                f"{type(self.weighting).__name__} looks at whole optimizer steps: train with a ChatDataModule"
            )
        if data is not None and getattr(data, "is_packed", False):
            with self.trainer.precision_plugin.forward_context():
                self._network.check_borders()
        prepare_adapters(self._network, initial=self.is_initial)
        self._prepare_layers(data)
        self._prepare_reference(["train", "val"])

    def _prepare_layers(self, data: "ChatDataModule | None") -> None:
        """Recomputation and compilation, once; what is compiled is for the shape of this fit's batches."""
        decoder = self._network.base.get_decoder()
        if not self._layers_ready:
            self._layers_ready = True
            self.recomputation = self._recomputation(data)
            recompute(decoder, self.recomputation)
            if self.compile_layers:
                compile_layers(decoder)
        if self.compile_layers:
            assert data is not None  # see `setup`
            rank_zero_info("Compiling the decoder's layers, once …")
            for batch in data.samples():
                rehearse(self._network, self._moved(batch), self.trainer.precision_plugin.forward_context())

    def on_train_start(self) -> None:
        """After a resume: the run's own learning rate and other settings are in force, and what has changed is said."""
        self.step.skipped.forget_later(self.trainer)
        if self._resumed is None:
            return
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        changed = restore_settings(self.trainer.optimizers[0], cast(Any, scheduler), self._settings)
        others = resume.changes(self._resumed["settings"], resume.settings_of(self))
        changed += [f"{what} {change}" for what, change in others.items()]
        if changed:
            rank_zero_info(f"Going on with other settings than the checkpoint's: {', '.join(changed)}")

    def configure_optimizers(self) -> Any:
        """The optimizer over everything trainable, and the schedule, a step at a time."""
        optimizer = self.optimizer([parameter for parameter in self._network.parameters() if parameter.requires_grad])
        self.take_found_lr(optimizer)
        if self._resumed is not None:
            then, now = self._resumed["optimizer"], type(optimizer).__qualname__
            resume.refuse({"optimizer": {"": then}}, {"optimizer": {"": now}})
        refuse_fused_scaling(self.trainer, optimizer)
        refuse_parts(self.trainer, optimizer)
        total = self.total_steps
        scheduler = schedule(optimizer, self.lr_schedule, int(self.warmup_ratio * total), total)
        self._settings = settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what makes this run what it is."""
        keep_averages(self.trainer, checkpoint)
        if self.trainer.optimizers:
            checkpoint[resume.CHECKPOINT_KEY] = resume.facts_of(self)
            if self.old_policy is not None:
                checkpoint[resume.CHECKPOINT_KEY]["old_policy"] = self.old_policy.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on as another run; see `allow_changes`."""
        self.is_initial = False
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if resume.CHECKPOINT_KEY not in checkpoint:
            raise UserError("the checkpoint was not written by a training run of dft-lightning: start a new run")
        take_current(checkpoint)
        facts, now = checkpoint[resume.CHECKPOINT_KEY], resume.identity(self)
        resume.refuse(facts["identity"], now, self.allow_changes)
        resume.refuse({"shapes": resume.shapes(checkpoint["state_dict"])}, {"shapes": resume.shapes(self.state_dict())})
        resume.rescale_progress(checkpoint, self.trainer.accumulate_grad_batches)
        self.step.skipped.load(facts["skipped"])
        if self.old_policy is not None and "old_policy" in facts and facts["identity"]["data"] == now["data"]:
            self.old_policy.load(facts["old_policy"])
        self._resumed = facts
