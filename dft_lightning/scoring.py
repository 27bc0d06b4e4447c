"""A causal language model whose tokens are scored under a weighting: for validation, tests, predictions and training.

Shapes: N supervised tokens of a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dft_lightning import resume
from dft_lightning.adapter_folders import Adapter, AdapterFolder, tokenizer_of
from dft_lightning.embedding_rows import prepare_source
from dft_lightning.errors import UserError
from dft_lightning.initial_model import Reference, build, read_adapter, reference_in_force
from dft_lightning.loading import ModelSource, Precision, load_tokenizer
from dft_lightning.logprob import ReferenceHead
from dft_lightning.loss_terms import RouterOption, UnsupportedLosses, refuse_terms, router_for_scoring
from dft_lightning.metrics import TokenMeans, token_sums
from dft_lightning.models import LoRA, WeightedLM
from dft_lightning.module_base import ModuleBase
from dft_lightning.normalizer import Normalize, token_factor, units
from dft_lightning.old_policy import OldPolicy
from dft_lightning.precision import computed_in, held_and_computed, refuse_logits, refuse_precision
from dft_lightning.prepass import reduced
from dft_lightning.reference import initial_copy, prepare_reference
from dft_lightning.refusals import refuse_ids
from dft_lightning.router_loss import RouterLoss
from dft_lightning.sharding.initial import initial_network, refuse_strategy
from dft_lightning.sharding.layers import let_go
from dft_lightning.step_weights import unweighted, weigh_together, weighed
from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.base import REF_DISTRIBUTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.data.batch import Batch


class WeightedModule(ModuleBase):
    """The part of `FineTuner` that needs no training: it loads the model, and scores batches under the weighting."""

    source: ModelSource
    weighting: TokenWeighting
    lora: LoRA | None
    adapter: Adapter | None
    normalize: Normalize
    dtype_choice: Precision
    chat_template: str | None
    tokenizer_name: str | None
    resize_embeddings: bool | int
    reference: Reference
    chunk_rows: int | None
    logits: Literal["float32", "bfloat16"]
    router_loss: RouterOption
    unsupported_losses: UnsupportedLosses

    def __init__(self) -> None:
        super().__init__()
        self.network: WeightedLM | None = None
        self.is_initial = False
        """Whether the weights are those that were loaded: not trained yet, and no checkpoint's."""
        self.means = TokenMeans()
        self.allow_changes: frozenset[str] = frozenset()
        """What may differ from the checkpoint that a run goes on from: see `resume.Change`."""
        self.reference_weights: str | None = None
        """sha256 of the model that the weighting compares with."""
        self.router: RouterLoss | None = None
        """The router loss in force."""
        self.old_policy: OldPolicy | None = None
        """Where the weighting compares with the policy of some steps ago."""
        self._initial: list[WeightedLM] = []  # a frozen copy of the initial model: no part of this module's state
        self.asked_lora: LoRA | None = None
        """As the options have it, where `lora` is that of an adapter which is trained further."""
        self._resumed: Mapping[str, Any] | None = None  # facts of the checkpoint that the run goes on from
        self._validated: list[tuple[TokenStats, Batch]] = []

    @property
    def model(self) -> Any:
        """The transformers model, or the peft model around it."""
        return self._network.model

    @property
    def _network(self) -> WeightedLM:
        if self.network is None:
            raise UserError(
                "the model is not loaded yet: a fit, validate, test or predict of the trainer loads it, and so does "
                "configure_model()"
            )
        return self.network

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with the chat template in force."""
        if self.tokenizer_name is None:
            source = self.source if self.adapter_folder is None else tokenizer_of(self.source)
        else:
            source = replace(self.source, name=self.tokenizer_name, revision=None)
        return load_tokenizer(source, self.chat_template)

    @cached_property
    def adapter_folder(self) -> AdapterFolder | None:
        """The adapter that model_name stands for, if any; see `read_adapter`."""
        return read_adapter(self)

    @property
    def base_source(self) -> ModelSource:
        """Where the model is, or the base model of an adapter."""
        source = prepare_source(self)
        return source if self.adapter_folder is None else self.adapter_folder.base_of(source)

    @property
    def reference_in_force(self) -> Reference | None:
        """Where the reference comes from; None where the weighting needs none."""
        return reference_in_force(self)

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.network is not None:
            return
        refuse_strategy(self._trainer)
        _ = self.adapter_folder  # it may have the settings of LoRA
        refuse_precision(self, self._precision)
        refuse_terms(self)
        self.source.dtype, self.source.compute = held_and_computed(self.dtype_choice, self._precision)
        refuse_logits(self.logits, computed_in(self._trainer) or self.source.dtype, self._precision)
        self.network = initial_network(self)
        refuse_ids(self.weighting, self.network.base.get_output_embeddings().weight.shape[0])
        self.is_initial = True

    def initial_model(self, *, empty: bool = False) -> Any:
        """The model as it is before any training, adapters included; or its shape alone, see `load_model`."""
        return build(self, empty=empty)

    @property
    def _precision(self) -> str:
        return str(self.trainer.precision) if self._trainer is not None else "32-true"

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

    def _moved(self, batch: "Batch") -> "Batch":
        return batch.to(self.device, non_blocking=self.device.type == "cuda")

    def score(
        self,
        batch: "Batch",
        wanted: frozenset[str] = frozenset(),
        weight: Tensor | None = None,
        router: RouterLoss | None = None,
    ) -> tuple[Tensor, TokenStats]:
        """The loss of a micro-batch (a sum) and its tokens' statistics, weights included.

        A weighting of step scope needs the `weight` (N,) of each token; see `score_together`. `router` records.
        """
        loss, tokens = self._network(
            batch,
            self.weighting,
            factor=token_factor(self.normalize, batch),
            progress=self.progress,
            wanted=wanted,
            ref_logp=self._ref_logp(batch),
            old_logp=self._old_logp(batch),
            reference=self._reference(batch),
            weight=weight,
            router=router,
            **self._head_options,
        )
        let_go(*self._initial, around=True)  # no backward pass follows, at whose end sharded ones do so themselves
        return loss, tokens

    @property
    def _head_options(self) -> dict[str, Any]:
        return {"chunk_rows": self.chunk_rows, "logits": torch.bfloat16 if self.logits == "bfloat16" else None}

    @torch.no_grad()
    def score_together(self, batches: "list[Batch]", wanted: frozenset[str] = frozenset()) -> list[TokenStats]:
        """The tokens of some micro-batches, weighted as if they were all of a step; all ranks have to call this."""
        moved = [self._moved(batch) for batch in batches]
        if self.weighting.scope != "step":
            return [self.score(batch, wanted)[1] for batch in moved]
        tokens = [unweighted(self, batch, wanted) for batch in moved]
        weights = self._weigh_together(tokens)
        known = zip(moved, tokens, weights, strict=True)
        return [weighed(self, batch, part, weight, wanted)[1] for batch, part, weight in known]

    def _weigh_together(self, parts: list[TokenStats]) -> list[Tensor]:
        return weigh_together(self.weighting, parts, self.trainer.world_size)

    def _ref_logp(self, batch: "Batch") -> Tensor | None:
        if "ref_logp" not in self.weighting.needs:
            return None
        if self.reference_in_force == "cache":
            return batch.ref_logp
        return self._reference_network.logp(batch, adapter=self._reference_has_adapter, **self._head_options)

    def _reference(self, batch: "Batch") -> ReferenceHead | None:
        """What gives the reference's distributions, where the weighting wants them."""
        if REF_DISTRIBUTION not in self.weighting.needs:
            return None
        return self._reference_network.reference(batch, adapter=self._reference_has_adapter)

    @property
    def _reference_has_adapter(self) -> bool:
        """Whether the adapter belongs to the reference, the initial model: switched off, a trained one is not."""
        return self.adapter == "continue"

    @property
    def _reference_network(self) -> WeightedLM:
        return self._network if self.reference_in_force == "adapter_off" else self._initial[0]

    def _old_logp(self, batch: "Batch") -> Tensor | None:
        """Under the old policy, (N,), where the weighting needs it; outside of training the policy is its own."""
        if "old_logp" not in self.weighting.needs:
            return None
        if self.training:
            assert self.old_policy is not None, "there is one where the weighting needs it"
            return self.old_policy.of(batch)
        return self._network.logp(batch, **self._head_options)

    def _record(self, stage: str, values: Mapping[str, Tensor], step: int | None, on_bar: set[str]) -> None:
        """Values for callbacks and the progress bar; and, at `step`, for the loggers: optimizer steps done by then."""
        fitting = self.trainer.state.fn == "fit"
        for name, value in values.items():  # equal on all ranks: summed over them before
            self.log(f"{stage}/{name}", value.to(torch.float32), prog_bar=name in on_bar, logger=not fitting)
        if step is not None and fitting and not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics({f"{stage}/{name}": float(value) for name, value in values.items()}, step)

    def on_validation_start(self) -> None:
        """As for training, in `dft validate`."""
        if self.trainer.state.fn == "validate":
            self._prepare_reference(["val"])
            self.router = router_for_scoring(self)

    def on_test_start(self) -> None:
        """As for training."""
        self._prepare_reference(["test"])
        self.router = router_for_scoring(self)

    def on_predict_start(self) -> None:
        """As for training."""
        self._prepare_reference(["train"])

    def set_reference(self, weights: str) -> None:
        """Take note of the sha256 of the reference model; refused where the run had another one before."""
        then = None if self._resumed is None else self._resumed["reference"]
        if then is not None:
            before, now = ({"model": {"reference weights": which}} for which in (then, weights))
            resume.refuse(before, now, self.allow_changes)
        self.reference_weights = weights

    def _prepare_reference(self, stages: list[str]) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.reference_in_force == "copy" and not self._initial:
            self._initial.append(initial_copy(self))
        elif self.reference_in_force == "cache":
            prepare_reference(self, data, stages)

    def validation_step(self, batch: "Batch", batch_idx: int) -> None:
        """Add a batch to the means over the whole validation set."""
        if self.weighting.scope == "step":  # the set is the step
            self._validated.append((unweighted(self, batch, frozenset({"rank"}), self.router), batch))
        else:
            loss, tokens = self.score(batch, frozenset({"rank"}), router=self.router)
            self._add_to_means(loss, tokens, batch)
        if self.router is not None:
            self.router.validate()

    def _add_to_means(self, loss: Tensor, tokens: TokenStats, batch: "Batch") -> None:
        count = units(self.normalize, batch, self.weighting.divisor, tokens.need("weight"))
        self.means.update(token_sums(loss, count, tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the validation means."""
        self._log_means("val")

    def test_step(self, batch: "Batch", batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the test means."""
        self._log_means("test")

    @torch.no_grad()
    def _log_means(self, stage: str) -> None:
        held, self._validated = self._validated, []
        weights = self._weigh_together([tokens for tokens, _ in held]) if held else []
        for (tokens, batch), weight in zip(held, weights, strict=True):
            self._add_to_means(*weighed(self, batch, tokens, weight, frozenset({"rank"})), batch)
        routed = {} if self.router is None else self.router.validated(lambda sums: reduced(self, sums))
        self._record(stage, self.means.compute() | routed, self.trainer.global_step, {"nll", "p_mean"})
        self.means.reset()

    def predict_step(self, batch: "Batch", batch_idx: int) -> tuple["Batch", dict[str, Tensor]]:
        """The batch and the statistics of its tokens by name; weights of step scope are not known here, and NaN."""
        wanted = frozenset({"entropy", "rank"})
        if self.weighting.scope != "step":
            return batch, self.score(batch, wanted)[1].tensors()
        tokens = replace(unweighted(self, batch, wanted), sequence=batch.sequence)
        return batch, replace(tokens, weight=torch.full_like(tokens.logp, torch.nan)).tensors()
