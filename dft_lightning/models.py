"""A causal language model, split into backbone and head, whose forward is the weighted loss.

Shapes: B rows of T positions, N supervised tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dft_lightning.adapter_names import of_adapter
from dft_lightning.adapters import LoRA as LoRA
from dft_lightning.adapters import add_lora as add_lora
from dft_lightning.adapters import in_force
from dft_lightning.attention import implementation_of, inputs
from dft_lightning.attention_choice import check_causal
from dft_lightning.data.batch import Batch
from dft_lightning.errors import UserError
from dft_lightning.logits import logit_transform, splits
from dft_lightning.logprob import LogitTransform, ReferenceHead, weighted_nll
from dft_lightning.model_checks import ModelChecks
from dft_lightning.own_loss import OwnLoss, own_loss
from dft_lightning.quantization import leave_out_of_states
from dft_lightning.router_loss import RouterLoss, recording
from dft_lightning.weighting import TokenStats, TokenWeighting, Uniform


class WeightedLM(ModelChecks):
    """A causal language model whose forward is the weighted loss: the one module that may be a sharded model's root.

    Args:
        model: a `PreTrainedModel`, or a `PeftModel` around one.

    Raises:
        UserError: the output head is not a plain linear layer, or its logits are not understood.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.observer: Callable[[Batch, Tensor, Tensor, LogitTransform], None] | None = None
        """Shown each batch that is scored, its hidden states (N, H), head and transform, within `forward`."""
        self._transform = logit_transform(self.base.config)
        self._check_head()
        if self._is_packed:
            leave_out_of_states(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightedLM":
        """Move or cast the parameters, but keep the precision of buffers and adapters.

        A half-precision run casts the whole module, and rotary frequencies rounded to bfloat16 are wrong positions, and
        most updates of an adapter in bfloat16 are lost. Adapters have the precision that their options say.
        """
        kept = self._of_own_precision()

        def moved(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return tensor.to(applied.device) if id(tensor) in kept and applied.dtype != tensor.dtype else applied

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _of_own_precision(self) -> dict[int, Tensor]:
        """Buffers, adapters and the adapters' gradients, by identity."""
        adapters = [parameter for name, parameter in self.named_parameters() if of_adapter(name)]
        gradients = [parameter.grad for parameter in adapters if parameter.grad is not None]
        found: list[Tensor] = [*self.buffers(), *adapters, *gradients]
        return {id(tensor): tensor for tensor in found if tensor.is_floating_point()}

    @property
    def base(self) -> Any:
        """The transformers model (a `PreTrainedModel`), adapters or not."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA is in place, which can be switched off."""
        return hasattr(self.model, "disable_adapter")

    @property
    def head(self) -> nn.Linear:
        """The layer that gives the logits; of one that is trained in full next to adapters, what is in force."""
        found: nn.Linear = in_force(self.base.get_output_embeddings())
        return found

    @property
    def _is_packed(self) -> bool:
        return getattr(self.base, "is_loaded_in_4bit", False)

    @cached_property
    def left_out(self) -> str | None:
        """sha256 of what this module's state leaves out: a base in 4 bits."""
        from dft_lightning.reference import fingerprint_of_base

        return fingerprint_of_base(self.base) if self._is_packed else None

    def forward(
        self,
        batch: Batch,
        weighting: TokenWeighting,
        *,
        factor: Tensor | None = None,
        progress: float = 0.0,
        wanted: Collection[str] = (),
        ref_logp: Tensor | None = None,
        old_logp: Tensor | None = None,
        weight: Tensor | None = None,
        chunk_rows: int | None = None,
        logits: torch.dtype | None = None,
        reference: ReferenceHead | None = None,
        router: RouterLoss | None = None,
    ) -> tuple[Tensor, TokenStats]:
        """Σ sg(w)·n·(−log π) over the batch's supervised tokens, and their statistics; see `weighted_nll`.

        `wanted` may name "stop" and "data_weight", too, which come from the batch. `router` records the routing.
        """
        head = self.head
        brought: dict[str, Any] = {"position": batch.position, "ref_logp": ref_logp, "old_logp": old_logp}
        asked = weighting.needs | set(wanted)
        brought |= {name: getattr(batch, name) for name in ("stop", "data_weight") if name in asked}
        hidden = self.hidden(batch, router)
        if self.observer is not None:
            self.observer(batch, hidden.detach(), head.weight, self._transform_of(head))
        return weighted_nll(
            hidden,
            head.weight,
            batch.target,
            weighting,
            sequence=batch.sequence,
            factor=factor,
            transform=self._transform_of(head),
            progress=progress,
            wanted=wanted,
            weight=weight,
            chunk_rows=chunk_rows,
            lengths=batch.counts,
            logits=logits,
            reference=reference,
            **{name: value for name, value in brought.items() if value is not None},
        )

    def _transform_of(self, head: nn.Linear) -> LogitTransform:
        return LogitTransform(head.bias, self._transform.scale, self._transform.softcap)

    def hidden(self, batch: Batch, router: RouterLoss | None = None) -> Tensor:
        """Last hidden states (N, H) at the positions whose next token is supervised."""
        decoder = self.decoder
        given = inputs(batch, implementation_of(decoder)) | recording(decoder, router is not None)
        output = decoder(**given)
        if router is not None:
            router.record(output.router_logits, batch)
        states = output.last_hidden_state  # (B, T, H)
        flat: Tensor = states.flatten(0, 1).index_select(0, batch.supervised)
        return flat

    @torch.no_grad()
    def logp(self, batch: Batch, *, adapter: bool = True, **head_options: Any) -> Tensor:
        """log π (N,) of the supervised tokens in evaluation mode, at least float32; without the adapter if asked.

        Args:
            head_options: `chunk_rows` and `logits` of `forward`.
        """
        with self._evaluating(adapter):
            return self.forward(batch, Uniform(), **head_options)[1].logp

    @torch.no_grad()
    def reference(self, batch: Batch, *, adapter: bool = False) -> ReferenceHead:
        """What gives the distributions at the supervised positions, in evaluation mode; with the adapter if asked."""
        with self._evaluating(adapter):
            return ReferenceHead(self.hidden(batch), self.head.weight, self._transform_of(self.head))

    @contextmanager
    def _evaluating(self, adapter: bool) -> Iterator[None]:
        """Evaluation mode for a while; without the adapter if asked."""
        training = self.training
        self.eval()
        try:
            with nullcontext() if adapter or not self.has_adapter else self.model.disable_adapter():
                yield
        finally:
            self.train(training)

    def own_loss(self, router_logits: bool) -> OwnLoss:
        """What the model itself makes of some tokens as its loss; see `loss_terms`."""
        return own_loss(self.base, router_logits)

    def _check_head(self) -> None:
        head = self.head
        kind = type(self.base).__name__
        if hasattr(head, "base_layer"):
            raise UserError(
                f"LoRA would adapt the output head of {kind}, whose weight the loss reads as one: leave the head "
                "(lm_head) out of --model.lora.target_modules; untied, it can be trained in full by "
                "--model.lora.modules_to_save"
            )
        if type(head) is not nn.Linear:
            raise UserError(
                f"the output head of {kind} is a {type(head).__name__}; a plain linear layer was expected. With LoRA, "
                "leave the head (lm_head) out of --model.lora.target_modules"
            )
        if self.base.device.type == "meta":
            return
        check_causal(self.base, self.vocabulary)
        if not splits(self, head):
            raise UserError(
                f"{kind} does something to its logits beyond head bias, logit scale and soft-cap, so its "
                "log-probabilities would be wrong here: this model is not supported"
            )
