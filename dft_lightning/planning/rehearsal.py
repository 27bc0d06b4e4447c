"""One micro-batch through the model's own code with tensors that have shapes only: what it holds, and when.

Nothing is computed and no weight is loaded, so it runs anywhere. Fake tensors on the CPU follow the same code as real
ones; autocast and activation checkpointing are the real ones. The two places where a GPU does something else, varlen
attention and the loss head, have stand-ins that make the same tensors.

Shapes: B rows of T positions, N supervised tokens, H hidden size, V vocabulary, A attention heads, E width of a head.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dft_lightning.adapter_names import of_adapter
from dft_lightning.attention import inputs
from dft_lightning.attention_choice import built
from dft_lightning.data.batch import Batch, Collator
from dft_lightning.decoder import decoder_of
from dft_lightning.embedding_rows import train_embeddings
from dft_lightning.freezing import NOTHING, Freezing
from dft_lightning.logprob.products import only_native_bfloat16
from dft_lightning.logprob.rows import block_rows
from dft_lightning.logprob.targets import GPU_BLOCK_BYTES
from dft_lightning.models import LoRA, add_lora
from dft_lightning.planning.four_bits import pack, refuse_dora
from dft_lightning.planning.grouped_products import GroupedProducts
from dft_lightning.planning.live_bytes import LiveBytes
from dft_lightning.recomputation import Recomputation, recompute
from dft_lightning.router_loss import recording, routing_of
from dft_lightning.shapes import shapes_only

_TARGET_BLOCKS = 6  # of a block's rows: logits, log p, the reference's, targets, gradient, and one in the making
_TOLD = "varlen_rehearsed"  # an implementation that is told the documents, as its name says
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
_ITSELF = (None, "eager", "sdpa")  # runs as it is


@dataclass(frozen=True)
class MicroBatch:
    """The shape of a micro-batch.

    Args:
        rows: tokens of each document, row by row.
        supervised: N.
        packed: whether a row may have several documents.
        width: positions of a row; by default as many as the longest needs.
    """

    rows: tuple[tuple[int, ...], ...]
    supervised: int
    packed: bool = False
    width: int | None = None

    @staticmethod
    def full(rows: int, width: int) -> "MicroBatch":
        """Rows of one document each, full, with every token but the first supervised."""
        return MicroBatch(((width,),) * rows, rows * (width - 1))

    def batch(self) -> Batch:
        """Such a batch, of zeros."""

        def document(length: int) -> dict[str, Any]:
            return {"row": 0, "input_ids": np.zeros(length, np.int64), "supervised": np.zeros(length, bool)}

        rows = [[document(length) for length in row] for row in self.rows]
        return Collator(packed=self.packed, width=self.width)(rows)


@dataclass(frozen=True)
class Setting:
    """What else decides how much memory a micro-batch takes.

    Args:
        dtype: of the weights.
        precision: as `trainer.precision`, in full.
        attention: as model.attn_implementation, but never None.
        recomputation: what the backward pass computes again.
        cuda: whether it runs on a GPU; the loss head goes other ways on a CPU.
        chunk_rows: rows of logits that the loss head holds.
        accumulates: whether gradients of earlier micro-batches are there.
        narrow_logits: whether the loss holds logits in the products' precision.
        together: whether all rows of a chunk are weighed together.
        router: whether there is a router loss.
        targets: 1 where there are targets over the vocabulary, 2 where these want the reference's logits, too.
        four_bits: whether the weights beside adapters are held in 4 bits.
        embeddings_trained: whether embedding and head are trained next to adapters.
        freezing: what of the model is not trained.
    """

    dtype: torch.dtype
    precision: str
    attention: str
    recomputation: Recomputation
    cuda: bool
    chunk_rows: int
    accumulates: bool
    narrow_logits: bool = False
    together: bool = False
    targets: int = 0
    four_bits: bool = False
    embeddings_trained: bool = False
    router: bool = False
    freezing: Freezing = NOTHING

    @property
    def autocast(self) -> torch.dtype | None:
        """What a mixed precision casts to."""
        return _MIXED.get(self.precision)


@dataclass(frozen=True)
class Footprint:
    """Bytes beside weights, optimizer state and the gradients that were there before.

    Args:
        saved: what the decoder keeps for the backward pass.
        head: most that the loss head adds.
        peak: most that there is at once.
        gradients: bytes of all gradients.
    """

    saved: int
    head: int
    peak: int
    gradients: int


def skeleton(
    config: Any, lora: LoRA | None, dtype: torch.dtype, precision: str, attention: str | None, four_bits: bool = False
) -> Any:
    """The model without its weights, on the meta device, in training mode.

    Lightning casts all parameters where the precision is a half one and "true"; adapters keep theirs.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_TOLD, _whole_rows)
    named = attention if attention in _ITSELF else _TOLD
    made: Any = AutoModelForCausalLM
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # of a model that is there already

    def build(attention: str | None) -> Any:
        return made.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)

    with torch.device("meta"):
        model = built(build, attention, named)
        if four_bits:
            refuse_dora(lora)
            pack(model, _MIXED.get(precision, dtype))
        model = (model if lora is None else add_lora(model, lora)).train()
    if precision in _CASTS:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not of_adapter(name):
                parameter.data = parameter.data.to(_CASTS[precision])
    return model


def _faked(model: nn.Module) -> None:
    """Put fake tensors on the CPU in place of the meta device's; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    wanted = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
                if tensor is not None:
                    held[name] = made[id(tensor)]  # type: ignore[assignment]


def rehearse(config: Any, lora: LoRA | None, shape: MicroBatch, setting: Setting) -> Footprint:
    """Forward and backward pass of a micro-batch, in shapes."""
    batch = shape.batch()
    with shapes_only() as fake:
        # transformers leaves the mask out of sdpa where it can, but not while it is traced
        plain = setting.attention == "sdpa" and not shape.packed
        attention = _TOLD if plain else setting.attention
        with unset_fake_temporarily():
            model = skeleton(config, lora, setting.dtype, setting.precision, attention, setting.four_bits)
            if setting.embeddings_trained:
                train_embeddings(model)
            setting.freezing.apply(model)
        _faked(model)
        base = model if lora is None else model.get_base_model()
        recompute(decoder_of(base), setting.recomputation)
        given = _to(fake, batch)
        trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        if setting.accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        before = [*base.parameters(), *base.buffers(), *_tensors(given), *gradients]
        with GroupedProducts(), LiveBytes(before) as live:
            return _run(base, given, shape.supervised, setting, live)


def _run(base: Any, batch: Batch, supervised: int, setting: Setting, live: LiveBytes) -> Footprint:
    decoder, head = decoder_of(base), base.get_output_embeddings()
    told = batch.position_ids is not None and decoder.config._attn_implementation == _TOLD
    capped = getattr(base.config.get_text_config(), "final_logit_softcapping", None) is not None
    casting = nullcontext() if setting.autocast is None else torch.autocast("cpu", setting.autocast)
    with casting:
        output = decoder(**inputs(batch, _TOLD if told else ""), **recording(decoder, setting.router))
        flat = output.last_hidden_state.flatten(0, 1).index_select(0, torch.zeros(supervised, dtype=torch.long))
        real = torch.ones(batch.input_ids.numel(), dtype=torch.bool)
        balance = routing_of(output.router_logits, real, 1).balance if setting.router else 0.0
        del output
        saved = live.now
        forward_peak, live.peak = live.peak, live.now
        loss = _LossHead.apply(flat, head.weight, setting, capped)  # type: ignore[no-untyped-call]
        del flat
        head_peak = live.peak - saved
    (loss + balance).backward()
    gradients = sum(p.numel() * p.element_size() for p in base.parameters() if p.requires_grad)
    return Footprint(saved, head_peak, max(forward_peak, live.peak), gradients)


def _to(fake: FakeTensorMode, batch: Batch) -> Batch:
    values: dict[str, Any] = {
        name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in vars(batch).items()
    }
    return Batch(**values)


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def _whole_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention that keeps what a varlen or flash kernel keeps: query, key, value, result and its logsumexp."""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


class _LossHead(torch.autograd.Function):
    """Makes the tensors that `weighted_nll` makes in one pass, without the products."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, setting: Setting, capped: bool) -> Tensor:
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        product = setting.autocast or hidden.dtype
        with torch.autocast("cpu", enabled=False):
            ctx.made = [
                torch.zeros_like(x, dtype=compute) if needed else None
                for x, needed in zip((hidden, weight), ctx.needs_input_grad[:2], strict=True)
            ]
            ctx.dtypes = hidden.dtype, weight.dtype
            plain = setting.cuda or setting.narrow_logits  # factors as they are
            narrow = product if plain or (product == torch.bfloat16 and only_native_bfloat16()) else compute
            rounded_weight = weight.to(product)
            factors = [rounded_weight] if plain else [rounded_weight.to(compute), rounded_weight.to(narrow)]
            del rounded_weight
            rows = min(setting.chunk_rows, max(len(hidden), 1))
            logits = hidden.new_empty((rows, len(weight)), dtype=product if setting.narrow_logits else compute)
            aside = _of_targets if setting.targets else _beside
            beside = aside(logits, compute, narrow, setting)
            states = hidden[:rows].to(product)
            factors += [states] if plain else [states.to(compute), states.to(narrow)]
            block = min(rows, block_rows(len(weight), compute))
            copies = 3 if capped and not setting.cuda else 0  # the kernel of a GPU has them in registers
            uncapped = [logits.new_empty((block, len(weight)), dtype=compute) for _ in range(copies)]
            del uncapped
            added = None
            if ctx.made[1] is not None and narrow != compute:  # a product that is added to the accumulator
                added = torch.zeros_like(weight, dtype=compute if setting.cuda else narrow)
            del factors, states, beside, added
            return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        scaled = [None if g is None else g.mul_(upstream).to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


def _of_targets(logits: Tensor, compute: torch.dtype, narrow: torch.dtype, setting: Setting) -> list[Tensor]:
    """What `TargetRows` holds beside the logits (R, V): the gradient, the reference's logits, and some of a block."""
    vocabulary = logits.shape[1]
    size = GPU_BLOCK_BYTES // (compute.itemsize * vocabulary) if setting.cuda else block_rows(vocabulary, compute)
    whole = [torch.empty_like(logits) for _ in range(setting.targets - 1)]
    whole += [] if logits.dtype == narrow else [torch.empty_like(logits, dtype=narrow)]
    block = min(len(logits), max(1, size)), vocabulary
    return whole + [logits.new_empty(block, dtype=compute) for _ in range(_TARGET_BLOCKS)]


def _beside(logits: Tensor, compute: torch.dtype, narrow: torch.dtype, setting: Setting) -> Tensor | None:
    """What the row step holds beside the logits (R, V)."""
    if setting.cuda:  # its kernel works in place; but a wide product is copied there
        if logits.dtype == compute != narrow:
            torch.empty_like(logits)
        return None
    if logits.dtype != compute:
        rows = len(logits) if setting.together else min(len(logits), block_rows(logits.shape[1], compute))
        return logits.new_empty((rows, logits.shape[1]), dtype=compute)
    return torch.empty_like(logits, dtype=narrow) if narrow != compute else None
