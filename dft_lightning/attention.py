"""How a batch is handed to a model so that no token sees another document, and the proof that none does.

Transformers' models keep packed documents apart where they get positions that restart, no attention mask and no cache.
Kernels for sequences of varying length are told the borders as well, and take all rows as one.

Shapes: B rows of T positions, D documents, H hidden size.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.router_loss import recording

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch

#: What is in the name of an implementation that is told where documents begin.
_TOLD = ("flash", "varlen")
_KNOWN = ("varlen", "sdpa", "eager", "flash_attention_2")
#: Lengths of the documents that the proof packs: shorter and longer than a tiny sliding window, and one token.
_PROOF = (7, 1, 12, 5)


def inputs(batch: "Batch", implementation: str) -> dict[str, Any]:
    """The decoder's arguments for a batch.

    Args:
        implementation: the model's attention implementation: eager, sdpa, flex_attention, flash_attention_2, …
    """
    if batch.position_ids is None:
        return {"input_ids": batch.input_ids, "use_cache": False}
    if not any(word in implementation for word in _TOLD):
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    borders = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
    return {
        "input_ids": batch.input_ids.reshape(1, -1),
        "position_ids": batch.position_ids.reshape(1, -1),
        "use_cache": False,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
        **borders,
    }


@torch.no_grad()
def check_borders(decoder: Any, vocabulary: int) -> None:
    """Prove on this very model that packed documents get the hidden states that each has alone, padding included.

    The bound is a relative L2 distance of √eps for each document: geometric middle between rounding, some eps, and a
    document that sees another, which changes by its own size.

    Raises:
        UserError: they do not, so packing would change what is learnt.
    """
    from dft_lightning.data.batch import Collator

    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (length,), generator=generator).numpy() for length in _PROOF]
    rows = [{"row": 0, "input_ids": ids, "supervised": np.ones(len(ids), dtype=bool)} for ids in documents]
    width = sum(_PROOF[:3]) + 2
    batch = Collator(packed=True, width=width)([rows[:3], rows[3:]])
    training = decoder.training
    decoder.eval()
    try:
        packed = _states(decoder, batch)
        alone = [_states(decoder, Collator()([[row]])) for row in rows]
    finally:
        decoder.train(training)
    starts = (0, _PROOF[0], _PROOF[0] + _PROOF[1], width)
    apart = max(
        float((packed[start : start + len(truth)] - truth).norm() / truth.norm())
        for start, truth in zip(starts, alone, strict=True)
    )
    if not apart <= _eps(decoder) ** 0.5:
        raise UserError(
            f"data.packing: attention {implementation_of(decoder)!r} of {type(decoder).__name__} lets packed sequences "
            f"see each other (their hidden states are off by {apart:.1%}): set --model.attn_implementation to "
            f"another of {', '.join(name for name in _KNOWN if name != implementation_of(decoder))}, or --data.packing "
            "to false"
        )


def _eps(decoder: Any) -> float:
    """A unit of rounding of what the decoder computes in."""
    kind = decoder.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else decoder.dtype
    return float(torch.finfo(dtype).eps)


def refuse_attention(name: str | None) -> None:
    """Refuse an implementation that transformers does not know, before any model is loaded."""
    from transformers import AttentionInterface

    interface: Any = AttentionInterface
    known = {"eager", "varlen", *interface().valid_keys()}
    if name is not None and name not in known and "/" not in name:  # with a slash it is a kernel of the hub
        raise UserError(f"model.attn_implementation is {name!r}; expected one of {', '.join(sorted(known))}")


def implementation_of(decoder: Any) -> str:
    """Which attention a model runs."""
    return str(getattr(decoder.config, "_attn_implementation", None))


def _states(decoder: Any, batch: "Batch") -> Tensor:
    """Hidden states (B·T, H)."""
    batch = batch.to(decoder.device)
    states: Tensor = decoder(**inputs(batch, implementation_of(decoder)), **recording(decoder)).last_hidden_state
    return states.flatten(0, 1).double()
