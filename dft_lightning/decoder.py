"""A causal language model's decoder and the list of its layers: found on the model itself, not by its name."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from dft_lightning.errors import UserError


def decoder_of(model: Any) -> Any:
    """The module that turns token ids into last hidden states, without the output head.

    `get_decoder` of transformers is right for nearly all families; where it returns the model itself (Llama 4's text
    model), it is the child that has the embedding of the tokens and not the head.

    Raises:
        UserError: the decoder cannot be separated from the head.
    """
    found, head = model.get_decoder(), model.get_output_embeddings()
    if found is not model and not _contains(found, head):
        return found
    embedding = model.get_input_embeddings()
    for child in model.children():
        if _contains(child, embedding) and not _contains(child, head):
            return child
    raise UserError(
        f"{type(model).__name__} has no decoder that can be separated from its output head: this model is not supported"
    )


def _contains(module: nn.Module, part: nn.Module | None) -> bool:
    return any(each is part for each in module.modules())


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: of its lists of modules (`layers`, `h`, `blocks`, …), the one with most parameters.

    Raises:
        UserError: there is none.
    """
    lists: list[Any] = [each for each in _outermost_lists(decoder) if len(each)]
    if not lists:
        raise UserError(
            f"{type(decoder).__name__} has no list of layers: set model.activation_checkpointing to none, "
            "model.compile to false, and trainer.strategy to another than fsdp2"
        )
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))])


def refuse_shared(decoder: nn.Module) -> None:
    """Refuse to shard a decoder of which several layers have one parameter (Zamba 2).

    Raises:
        UserError: it names the parameter.
    """
    owners: set[int] = set()
    for layer in layers_of(decoder):
        own = {id(parameter): name for name, parameter in layer.named_parameters()}
        if both := owners & own.keys():
            raise UserError(
                f"trainer.strategy fsdp2 shards layer by layer, but several layers of {type(decoder).__name__} share "
                f"{min(own[each] for each in both)}: set trainer.strategy to ddp or auto"
            )
        owners |= own.keys()


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists that are not within another list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
