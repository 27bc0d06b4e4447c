"""`FineTuner`: one training step, whatever a token is worth."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning import resume
from dft_lightning.adapter_folders import Adapter
from dft_lightning.adapters import prepare_adapters
from dft_lightning.averaging import keep_averages, take_current
from dft_lightning.compilation import compile_layers, refuse_changing_shapes, rehearse
from dft_lightning.data_weights import check_data_weights
from dft_lightning.errors import UserError
from dft_lightning.freezing import freezing_of
from dft_lightning.initial_model import Reference
from dft_lightning.loading import ModelSource, Precision
from dft_lightning.loss_terms import RouterOption, UnsupportedLosses, prepare_loss_terms
from dft_lightning.models import LoRA
from dft_lightning.monitors import check_monitors
from dft_lightning.normalizer import Normalize
from dft_lightning.old_policy import OldPolicy, window_of
from dft_lightning.optimization import configured, papers_adamw, put_in_force
from dft_lightning.optimizers import MuonAdamW, Optimization
from dft_lightning.parameter_groups import Exempt
from dft_lightning.prepass import Prepass, prepass, refuse_without_steps, router_share
from dft_lightning.quantization import Quantization
from dft_lightning.recomputation import Recomputation, recompute
from dft_lightning.refusals import refuse
from dft_lightning.row_limits import check_limits
from dft_lightning.scoring import WeightedModule
from dft_lightning.seeds import run_seed, seeded
from dft_lightning.step import StepInTheMaking
from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.spec import check_instance, from_spec, to_spec

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
        optimizer: any optimizer class; a bare name is torch's. The default is the DFT paper's AdamW; another class has
            its own defaults. Muon takes matrices; embeddings, output head, norms and biases then get AdamW.
        muon_adamw: with Muon, AdamW's settings for what is not a matrix, e.g. --model.muon_adamw.lr 1e-4.
        weight_decay_exempt: kinds of parameters without weight decay, of norm, bias, embedding; by default none.
        lr_schedule: name of a schedule of transformers: cosine, linear, constant_with_warmup, …
        lr_schedule_kwargs: further arguments of the schedule, e.g. '{min_lr_rate: 0.1}' for cosine_with_min_lr.
        warmup_ratio: share of the steps over which the learning rate rises from 0; the schedule constant has none.
        freeze: patterns of names of parameters that are not trained, e.g. '["model.embed_tokens.*"]'.
        train_only: patterns of names of the parameters that alone are trained.
        dtype: of the weights; auto means that of trainer.precision where it ends in "-true", else float32.
        attn_implementation: sdpa, eager, varlen (ours, for packed rows), flash_attention_2, …; by default what
            transformers chooses.
        activation_checkpointing: what the backward pass computes again in place of keeping it. selective: all but
            matrix products and attention; full: whole layers, up to a third more time; auto: the least that fits.
        compile: compile the decoder's layers; rows have to be packed (data.packing true), so that shapes are fixed.
        lora: train low-rank adapters instead of all weights, e.g. --model.lora.rank 8.
        adapter: where model_name is a LoRA adapter (folder or hub). continue: train it further, with its own settings;
            merge: merge it into its base model first, and train that, or a new adapter on it if lora is set.
        quantization: hold what is not trained in 4 bits ("nf4"), under LoRA alone; needs bitsandbytes.
        reference: what a weighting compares with, the initial model: a cache on disk of its log-probabilities, computed
            once; the model with its adapter off; or a frozen copy in memory. auto takes a new adapter if there is one,
            else (as with adapter continue) the cache, or the copy where distributions over the vocabulary are wanted.
        tokenizer_name: where the tokenizer comes from, if not from the model.
        chat_template: replaces the tokenizer's: llama3, deepseek_math, chatml, or a .jinja file.
        chunk_rows: tokens whose logits the loss holds at a time; by default as many as fit 200 MiB (CPU), 2 GiB (GPU).
        logits: in what the loss holds logits before the softmax, which is computed in float32 either way. bfloat16, for
            bfloat16 products, is faster on a CPU, and as exact as plain bfloat16 training.
        router_loss: coefficient of a mixture of experts' load-balancing loss. auto: the model configuration's
            router_aux_loss_coef if output_router_logits is true there, else none. none: no such loss.
        unsupported_losses: refuse, or ignore, other loss terms that the model's configuration asks for: z-loss,
            multi-token prediction, …; what is ignored is printed.
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many in a row end the run.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model; only for sources you trust.
        allow_missing: names or glob patterns of weights that may be missing from the model's checkpoint or have another
            shape there (they are initialised from the seed), or that the model does not use, e.g. '["lm_head.weight"]'.
        resize_embeddings: enlarge the embedding and the output head where the tokenizer has more tokens than they have
            rows; a number rounds the rows up to a multiple of it. All new rows are trained, with LoRA too.
    """

    def __init__(
        self,
        model_name: str,
        weighting: TokenWeighting,
        normalize: Normalize = "tokens",
        optimizer: OptimizerCallable = papers_adamw,
        muon_adamw: MuonAdamW | None = None,
        weight_decay_exempt: list[Exempt] | None = None,
        lr_schedule: str = "cosine",
        lr_schedule_kwargs: dict[str, Any] | None = None,
        warmup_ratio: float = 0.1,
        freeze: list[str] | None = None,
        train_only: list[str] | None = None,
        dtype: Precision = "auto",
        attn_implementation: str | None = None,
        activation_checkpointing: Recomputation | Literal["auto"] = "none",
        compile: bool = False,
        lora: LoRA | None = None,
        adapter: Adapter | None = None,
        quantization: Quantization | None = None,
        reference: Reference = "auto",
        tokenizer_name: str | None = None,
        chat_template: str | None = None,
        chunk_rows: int | None = None,
        logits: Literal["float32", "bfloat16"] = "float32",
        router_loss: RouterOption = "auto",
        unsupported_losses: UnsupportedLosses = "refuse",
        max_skipped_steps: int = 20,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_missing: list[str] | None = None,
        resize_embeddings: bool | int = False,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in {"self", "optimizer", "__class__"}}
        super().__init__()
        # A checkpoint holds plain data, and is loaded without pickle: a weighting and LoRA come back as dictionaries.
        self.weighting = _revived(weighting, from_spec)
        try:
            check_instance(self.weighting)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.lora = _revived(lora, lambda fields: LoRA(**fields))
        muon_adamw = _revived(muon_adamw, lambda fields: MuonAdamW(**fields))
        given |= {"lora": self.lora and asdict(self.lora), "muon_adamw": muon_adamw and asdict(muon_adamw)}
        self.save_hyperparameters(given | {"weighting": to_spec(self.weighting)})
        self.optimization = Optimization(optimizer, muon_adamw, tuple(weight_decay_exempt or ()))
        self.lr_schedule, self.lr_schedule_kwargs, self.warmup_ratio = lr_schedule, lr_schedule_kwargs, warmup_ratio
        self.freezing = freezing_of(freeze, train_only)
        self.source = ModelSource(model_name, torch.float32, attn_implementation, revision, trust_remote_code)
        self.source.quantization, self.dtype_choice, self.normalize = quantization, dtype, normalize
        self.adapter, self.tokenizer_name, self.chat_template = adapter, tokenizer_name, chat_template
        self.source.allow_missing, self.resize_embeddings = [*(allow_missing or [])], resize_embeddings
        self.reference, self.chunk_rows, self.logits = reference, chunk_rows, logits
        self.activation_checkpointing, self.compile_layers = activation_checkpointing, compile
        self.router_loss, self.unsupported_losses = router_loss, unsupported_losses
        self.step = StepInTheMaking(normalize, self.weighting.divisor, max_skipped_steps)
        self.wanted: frozenset[str] = frozenset()
        """Statistics of the distribution that a callback wants of the training tokens."""
        window = window_of(self.weighting)
        self.old_policy = OldPolicy(window) if window else None
        self.trained_on: TokenStats | None = None
        """The supervised tokens of the micro-batch just trained on, for callbacks."""
        self._settings: list[dict[str, Any]] = []  # in force, of each group of the optimizer
        self._layers_ready = False
        self.recomputation: Recomputation = "none"
        """What the backward pass computes again, once that is chosen."""
        self._ahead = Prepass()  # of the present step
        refuse(self)

    def initial_model(self, *, empty: bool = False) -> Any:
        """By the run's seed, with what is not trained frozen."""
        with seeded(self.seed):  # rows that a checkpoint lacks, adapters
            return self.freezing.apply(super().initial_model(empty=empty))

    def setup(self, stage: str) -> None:
        """Refuse data that do not go with the weighting; compiled layers want batches of one shape from the start."""
        data: Any = getattr(self.trainer, "datamodule", None)
        check_data_weights(self.weighting, data, stage)
        check_limits(self, data)
        if stage == "fit":
            check_monitors(self, data)
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
        self._ahead = prepass(self, step) if number == 0 else self._ahead
        self._seed(number)
        loss, tokens = self.score(batch, self.wanted, self._ahead.weight(number), self.router)
        self.trained_on = tokens
        added, value = router_share(self, batch, tokens, self._ahead.totals)
        self.step.add(loss, batch, tokens, value)
        return loss + added

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
        return run_seed()

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
        refuse_without_steps(self, data)  # of a router loss, it can only be known further below
        with self.trainer.precision_plugin.forward_context():
            if data is not None and getattr(data, "is_packed", False):
                self._network.check_borders()
            self._network.check_adapters()
        prepare_adapters(self._network, initial=self.is_initial and self.adapter != "continue")
        prepare_loss_terms(self)
        refuse_without_steps(self, data)
        self._prepare_layers(data)
        self._prepare_reference(["train", "val"])

    def _prepare_layers(self, data: "ChatDataModule | None") -> None:
        """Recomputation and compilation, once; what is compiled is for the shape of this fit's batches."""
        if not self._layers_ready:
            self._layers_ready = True
            from dft_lightning.planning.automatic import recomputation_of

            self.recomputation = recomputation_of(self, data)
            self._network.check_recomputation(self.recomputation)
            recompute(self._network.decoder, self.recomputation)
            if self.compile_layers:
                compile_layers(self._network.decoder)
        if self.compile_layers:
            assert data is not None  # see `setup`
            rank_zero_info("Compiling the decoder's layers, once …")
            for batch in data.samples():
                rehearse(self._network, self._moved(batch), self.trainer.precision_plugin.forward_context())

    def on_train_start(self) -> None:
        """After a resume: the run's own learning rate and other settings are in force, and what has changed is said."""
        self.step.skipped.forget_later(self.trainer)
        if self._resumed is not None:
            put_in_force(self, self._resumed)

    def configure_optimizers(self) -> Any:
        """The optimizer over everything trainable, and the schedule, a step at a time."""
        optimizer, scheduler, self._settings = configured(self, self._resumed)
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


def _revived(value: Any, build: Callable[[Mapping[str, Any]], Any]) -> Any:
    return build(value) if isinstance(value, Mapping) else value
