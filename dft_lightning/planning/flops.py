"""How many floating point operations (FLOPs) training needs by definition, whatever a program does to get there.

A product with a weight of P numbers costs 2·P a token forward, 2·P for the gradient by its input and, where it is
trained, 2·P for that by the weight. Attention multiplies each query with the keys, and the result with the values, of
the places up to its own: 4·A·E a pair forward, and twice that backward. Nothing that is recomputed is counted, no
padding, and no pass without gradient.

Shapes: A attention heads, E width of a head, H hidden size, V vocabulary, P numbers of a weight.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dft_lightning.decoder import decoder_of
from dft_lightning.shapes import run_in_shapes

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM


_NOTED = "dft_noted"  # an attention implementation that keeps what it is called with


class NotCountedError(ValueError):
    """The model does something whose operations are not known here."""


@dataclass(frozen=True)
class AttentionLayers:
    """Layers that look equally far back.

    Args:
        a_pair: forward FLOPs a pair of query and key, over all these layers and their heads.
        window: places that a token sees, itself included; None for all up to its own.
    """

    a_pair: int
    window: int | None = None

    def pairs(self, lengths: Sequence[int]) -> int:
        """Pairs of query and key in documents of such lengths."""
        return sum(_pairs(length, length if self.window is None else min(self.window, length)) for length in lengths)


def _pairs(length: int, window: int) -> int:
    return window * (window + 1) // 2 + (length - window) * window


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one forward and backward pass.

    Args:
        a_token: of the decoder's weights, a token read.
        a_supervised: of the output head, a supervised token; the others are dropped before it.
        attention: the layers with attention.
    """

    a_token: int
    a_supervised: int
    attention: tuple[AttentionLayers, ...]

    def of(self, lengths: Sequence[int], supervised: int) -> int:
        """FLOPs for documents of such lengths, with so many supervised tokens in all."""
        attended = sum(3 * layers.a_pair * layers.pairs(lengths) for layers in self.attention)
        return self.a_token * sum(lengths) + self.a_supervised * supervised + attended


def model_flops(network: "WeightedLM") -> ModelFlops:
    """What a model costs, adapters included; but not the lengths of whole weights' rows that DoRA takes in each pass.

    With a frozen embedding the gradient by the input of the first layer's query, key and value is needed by nobody,
    but counted: a small part of one layer.

    Raises:
        NotCountedError: a weight is no linear layer's (experts, a state space), or an attention is not known.
    """
    decoder, head = network.decoder, network.base.get_output_embeddings().weight
    return ModelFlops(
        a_token=sum((6 if trained else 4) * numbers for numbers, trained in _factors(decoder)),
        a_supervised=(6 if head.requires_grad else 4) * head.numel(),
        attention=tuple(_attention(network)),
    )


def _factors(decoder: nn.Module) -> Iterator[tuple[int, bool]]:
    """The numbers of each weight that every token is multiplied with, and whether it is trained."""
    from transformers.pytorch_utils import Conv1D

    for name, module in decoder.named_modules():
        if ".original_module" in f".{name}":  # a copy of it, trained next to adapters, computes in its place
            continue
        linear = isinstance(module, nn.Linear | Conv1D)
        for own, parameter in module.named_parameters(recurse=False):
            if linear and own == "weight":
                packed = isinstance(module, nn.Linear) and not parameter.is_floating_point()
                numbers = module.in_features * module.out_features if packed else parameter.numel()
                yield numbers, parameter.requires_grad
            elif parameter.ndim > 1 and not isinstance(module, nn.Embedding):
                raise NotCountedError(
                    f"the FLOPs of {name}.{own}, a weight of {type(module).__name__}, are not known here"
                )


def _attention(network: "WeightedLM") -> list[AttentionLayers]:
    """The layers by how far back they look: what each is called with, in a model of the same shape.

    Layers that do not call transformers' attention interface are counted by the configuration, if that
    tells of no window.
    """
    decoder = network.decoder
    config = decoder.config
    if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise NotCountedError(f"the FLOPs of {', '.join(sorted(unknown))} are not known here")
    found = _called(network.base)
    if found:
        far = {window: sum(pair for each, pair in found if each == window) for window, _ in found}
        return [AttentionLayers(pair, window) for window, pair in sorted(far.items(), key=lambda item: item[0] or 0)]
    if windows := [name for name in config.to_dict() if "window" in name or name == "attention_types"]:
        raise NotCountedError(
            f"the FLOPs of {type(decoder).__name__}'s attention, of which {windows[0]} says how far it looks, are not "
            "known here"
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [AttentionLayers(4 * config.num_attention_heads * width * config.num_hidden_layers)]


def _called(base: Any) -> list[tuple[int | None, int]]:
    """Window and forward FLOPs a pair of each attention layer: 2·A·(E + E of values); nothing where none is seen.

    Raises:
        NotCountedError: the model's code cannot be run in shapes.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    calls: list[tuple[int | None, int]] = []

    def note(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **more: Any) -> tuple[Tensor, None]:
        calls.append((more.get("sliding_window"), 2 * query.shape[1] * (query.shape[3] + value.shape[3])))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_NOTED, note)
    made: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = made.from_config(copy.deepcopy(base.config), attn_implementation=_NOTED)
    except Exception:  # each family says in another way that it takes none
        return []
    try:
        run_in_shapes(decoder_of(model))
    except Exception as error:
        if not calls:  # it takes none after all, or looks at values before its first layer
            return []
        reason = " ".join(str(error).split())[:200]
        raise NotCountedError(f"{type(base).__name__} does not run in shapes ({reason})") from error
    return calls
