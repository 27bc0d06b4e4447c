"""Packed documents against the same documents alone: hidden states and gradients of a small model, and `varlen` itself.

Truth is float32 with eager attention, document by document. The yardstick is the attention itself on documents alone,
in bfloat16: where it rounds once, the packed computation may round once more, in another order, so its error may be √2
times as large. A document that saw another would be off by its own size, a hundred times as much.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dft_lightning import varlen
from dft_lightning.attention import inputs
from dft_lightning.data.batch import Batch, Collator
from dft_lightning.models import WeightedLM
from dft_lightning.weighting import DFT
from gpu import models
from gpu.part import Measurement, Setting, SkippedError, attempt

LENGTHS = (9, 1, 140, 65, 33, 200)
HALF = 2**0.5
#: Family, and what of its configuration matters to attention: a window that is shorter than most documents.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding window": ("Mistral", {"sliding_window": 16}),
}


def run(setting: Setting) -> Iterator[Measurement]:
    """Each attention with each model; then our operator with its own."""
    for attention in ("sdpa", "varlen", "flash_attention_2"):
        for name in MODELS:
            yield from attempt(f"{attention}, {name}", packed, setting, attention, name)
    for window in (None, 16):
        yield from attempt(f"the varlen operator, window {window}", operator, setting, window)


def _network(setting: Setting, name: str, attention: str, dtype: torch.dtype) -> WeightedLM:
    from transformers import AutoModelForCausalLM

    varlen.register()
    family, changes = MODELS[name]
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    config = models.config(models.SMALL, family, **changes)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return WeightedLM(model.to(torch.bfloat16).to(dtype).to(setting.device).train())


def _rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"row": number, "input_ids": random.integers(0, 500, length), "supervised": np.arange(length) >= length // 4}
        for number, length in enumerate(LENGTHS)
    ]


def _results(network: WeightedLM, batches: list[Batch], attention: str) -> tuple[Tensor, Tensor]:
    """Hidden states of all positions, and the gradient, which batches add up to in float64."""
    states, gradient = [], torch.zeros((), dtype=torch.float64)
    for batch in batches:
        network.zero_grad()
        network(batch, DFT())[0].backward()
        parts = [p.grad.detach().flatten().double() for p in network.parameters() if p.grad is not None]
        gradient = gradient.to(parts[0]) + torch.cat(parts)
        with torch.no_grad():
            found = network.base.get_decoder()(**inputs(batch, attention)).last_hidden_state
        states.append(found.flatten(0, 1).double())
    return torch.cat(states), gradient


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).detach().norm() / truth.detach().norm())


def packed(setting: Setting, attention: str, name: str) -> Iterator[Measurement]:
    """Errors of one attention, packed over alone."""
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and (setting.dry or not is_flash_attn_2_available()):
        raise SkippedError("flash-attn is not installed" if not setting.dry else "flash-attn needs a GPU")
    rows = _rows()
    alone = [Collator()([[row]]).to(setting.device) for row in rows]
    together = Collator(packed=True)([rows]).to(setting.device)
    truth = _results(_network(setting, name, "eager", torch.float32), alone, "eager")
    network = _network(setting, name, attention, torch.bfloat16)
    network.check_borders()
    ours, yardstick = (_results(network, batches, attention) for batches in ([together], alone))
    for what, mine, theirs, true in zip(("hidden states", "gradient"), ours, yardstick, truth, strict=True):
        note = f"relative to float32; alone it is {_error(theirs, true):.2g}"
        yield Measurement(
            f"{attention}, {name}: error of the {what}", _error(mine, true), HALF * _error(theirs, true), note=note
        )


def operator(setting: Setting, window: int | None) -> Iterator[Measurement]:
    """`varlen.attend` (torch's own kernel on a GPU) against float64; the yardstick is plain attention in bfloat16."""
    torch.manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(1, heads, total, 64) for heads in (4, 2, 2)]
    given = [torch.randn(shape).to(setting.device, torch.bfloat16) for shape in shapes]
    weight = torch.randn(total, 4, 64, dtype=torch.float64).to(setting.device)
    borders = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32, device=setting.device)

    def results(dtype: torch.dtype, own: bool) -> list[Tensor]:
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in given)
        if own:
            out = varlen.attend(None, q, k, v, None, 0.2, sliding_window=window, cu_seq_lens_q=borders,
                                max_length_q=max(LENGTHS))[0][0]  # fmt: skip
        else:
            out = _plain(q, k, v, window)
        (out.double() * weight).sum().backward()
        return [out.double(), *(x.grad.double() for x in (q, k, v) if x.grad is not None)]

    truth, yardstick, ours = (
        results(torch.float64, False),
        results(torch.bfloat16, False),
        results(torch.bfloat16, True),
    )
    names = ("output", "gradient by q", "gradient by k", "gradient by v")
    for what, mine, theirs, true in zip(names, ours, yardstick, truth, strict=True):
        name = f"the varlen operator, window {window}: error of the {what}"
        yield Measurement(name, _error(mine, true), HALF * _error(theirs, true), note="bound: √2 × plain attention's")


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """(T, A, E): softmax of masked scores, document by document."""
    parts, start = [], 0
    for length in LENGTHS:
        own = slice(start, start := start + length)
        place = torch.arange(length, device=q.device)
        apart = place[:, None] - place
        seen = (apart >= 0) & (apart < (window or length))
        groups = q.shape[1] // k.shape[1]
        key, value = (x[0, :, own].repeat_interleave(groups, 0) for x in (k, v))  # (A, t, E)
        scores = (q[0, :, own] @ key.transpose(1, 2) * 0.2).masked_fill(~seen, -torch.inf)
        parts.append((F.softmax(scores, -1) @ value).transpose(0, 1))
    return torch.cat(parts)
