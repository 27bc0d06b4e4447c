"""How many floating point operations (FLOPs) training needs by definition, whatever a program does to get there.

A product with a weight of P numbers costs 2·P a token forward, 2·P for the gradient by its input and, where it is
trained, 2·P for that by the weight. Attention multiplies each query with the keys, and the result with the values, of
the places up to its own: 4·A·E a pair forward, and twice that backward. Nothing that is recomputed is counted, no
padding, and no pass without gradient.

Shapes: A attention heads, E width of a head, H hidden size, V vocabulary, P numbers of a weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM


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
    decoder, head = network.base.get_decoder(), network.base.get_output_embeddings().weight
    return ModelFlops(
        a_token=sum((6 if trained else 4) * numbers for numbers, trained in _factors(decoder)),
        a_supervised=(6 if head.requires_grad else 4) * head.numel(),
        attention=tuple(_attention(decoder.config)),
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


def _attention(config: Any) -> Iterator[AttentionLayers]:
    """The layers by how far back they look."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    a_layer = 4 * heads * width
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        yield AttentionLayers(a_layer * config.num_hidden_layers, window)
        return
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise NotCountedError(f"the FLOPs of {', '.join(sorted(unknown))} are not known here")
    for kind, far in (("full_attention", None), ("sliding_attention", window)):
        if kind in kinds:
            yield AttentionLayers(a_layer * kinds.count(kind), far)
