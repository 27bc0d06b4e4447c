"""How a batch is handed to a model so that no token sees another document, and the proof that none does.

Transformers' models keep packed documents apart where they get positions that restart, no attention mask and no cache.
Kernels for sequences of varying length are told the borders as well, and take all rows as one.

Shapes: B rows of T positions, D documents, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
def apart(decoder: Any, vocabulary: int) -> float:
    """How far the hidden states of packed documents are from those that each has alone, padding included.

    The largest relative L2 distance of a document; see `bound`.
    """
    from dft_lightning.data.batch import Collator

    documents = [document.numpy() for document in _documents(vocabulary)]
    rows = [{"row": 0, "input_ids": ids, "supervised": np.ones(len(ids), dtype=bool)} for ids in documents]
    width = sum(_PROOF[:3]) + 2
    batch = Collator(packed=True, width=width)([rows[:3], rows[3:]])
    with _evaluated(decoder):
        packed = _states(decoder, batch)
        alone = [_states(decoder, Collator()([[row]])) for row in rows]
    starts = (0, _PROOF[0], _PROOF[0] + _PROOF[1], width)
    return max(distance(packed[start : start + len(truth)], truth) for start, truth in zip(starts, alone, strict=True))


@torch.no_grad()
def foresight(decoder: Any, vocabulary: int) -> float:
    """How far hidden states move when a later token changes, as a relative L2 distance; see `bound`."""
    first, second = (states_alone(decoder, vocabulary, last=last)[:-1] for last in (0, 1))
    return distance(second, first)


@torch.no_grad()
def states_alone(decoder: Any, vocabulary: int, *, last: int = 0) -> Tensor:
    """Hidden states (T, H) of one document whose last token is another for each `last`."""
    longest = max(_documents(vocabulary), key=len)[None].to(decoder.device)
    longest[0, -1] = last
    with _evaluated(decoder):
        states: Tensor = decoder(input_ids=longest, use_cache=False).last_hidden_state
    return states[0].double()


def bound(decoder: Any) -> float:
    """What distance is rounding: √eps.

    It is the geometric middle between some eps, and a document or a token that sees another, which changes by its own
    size.
    """
    return float(_eps(decoder) ** 0.5)


def _documents(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in _PROOF]


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; infinite where it is not a number."""
    off = float((found - truth).norm() / truth.norm())
    return off if off == off else float("inf")


@contextmanager
def _evaluated(decoder: Any) -> Iterator[None]:
    training = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(training)


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
