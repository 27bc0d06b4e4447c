"""What kind each parameter is: by the module that owns it and by its shape, not by its name."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

Kind = Literal["matrix", "embedding", "head", "norm", "bias", "other"]
Exempt = Literal["norm", "bias", "embedding"]
"""What can be exempt from weight decay."""

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
    nn.LocalResponseNorm,
)


def kinds_of(model: Any) -> dict[nn.Parameter, Kind]:
    """The kind of each parameter of a model (a `PreTrainedModel`, or a `PeftModel` around one).

    An embedding that is tied with the output head is an embedding. Matrices are the two-dimensional weights of all
    other layers, adapters among them; `other` is what has more dimensions, or one without being a norm's or a bias.
    """
    found: dict[nn.Parameter, Kind] = {}
    for owner, name, parameter in _owned(model):
        kind = _kind(owner, name, parameter)
        if found.get(parameter, "matrix") == "matrix":
            found[parameter] = kind
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if found.get(weight) == "matrix":  # type: ignore[arg-type]
        found[weight] = "head"  # type: ignore[index]
    return found


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, f"{path}.{name}", parameter


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> Kind:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or "trainable_tokens" in name or "lora_embedding" in name:
        return "embedding"
    if is_norm(owner):
        return "norm"
    last = name.rpartition(".")[2]
    if last == "bias" or last.endswith("_bias"):
        return "bias"
    return "matrix" if parameter.dim() == 2 else "other"


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales features one by one: torch's own norms, and others by what they hold.

    A norm of a model's own code is a layer without layers in it whose parameters all have one dimension, a `weight`
    among them. DoRA's magnitudes look alike, and belong to peft.
    """
    if isinstance(module, _NORMS):
        return True
    own = dict(module.named_parameters(recurse=False))
    is_leaf = next(module.children(), None) is None
    adapter = type(module).__module__.startswith("peft.") or isinstance(module, nn.ParameterDict | nn.ParameterList)
    return is_leaf and not adapter and "weight" in own and all(each.dim() == 1 for each in own.values())


def split(
    parameters: Sequence[nn.Parameter], kinds: dict[nn.Parameter, Kind], exempt: Sequence[str]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay, and those of the kinds that are exempt from it."""
    free = [parameter for parameter in parameters if kinds[parameter] in exempt]
    ids = {id(parameter) for parameter in free}
    return [parameter for parameter in parameters if id(parameter) not in ids], free
