"""Which layers get an adapter where `--model.lora.target_modules` is "all-linear", and which weights get none, and why.

Found on the model itself: a layer is left out where peft rejects it in this family, where it is no plain product (a
router that returns a tuple), and where the model reads its weight without calling it, so that an adapter would have no
effect on what is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dft_lightning.errors import UserError
from dft_lightning.lora_report import Targets, pattern, patterns
from dft_lightning.shapes import run_in_shapes, without_weights

ALL_LINEAR = "all-linear"
_NO_PRODUCT, _READ = "no plain linear layer", "the model reads its weight without calling the layer, or not at all"
_SHARED = "several layers share its weight, into which their adapters cannot be merged"
_NOT_LINEAR, _NOT_BY_PEFT = "not the weight of a linear layer", "not adapted by peft in this family"
#: Where the forward of a linear layer may be from: bitsandbytes', or ours that stands for it in a plan.
_KNOWN_PLACES = ("bitsandbytes", "dft_lightning")


@dataclass(frozen=True)
class Choice:
    """What peft is told.

    Args:
        modules: as `LoraConfig.target_modules`.
        left_out: names of linear layers that "all-linear" leaves out, and why.
        everything: whether "all-linear" was asked for.
    """

    modules: str | list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    everything: bool = False


#: By class, configuration and adapters, since a plan makes the same model many times.
_CHOSEN: dict[Any, Choice] = {}


def choose(
    model: Any, asked: str | list[str], attempt: Callable[[Any, str | list[str]], Any], settings: str = ""
) -> Choice:
    """What to tell peft; "all-linear" without the layers that cannot be adapted.

    Args:
        model: a `PreTrainedModel`.
        asked: as `--model.lora.target_modules`.
        attempt: adds adapters to a model, given the targets; a `ValueError` where peft rejects them.
        settings: the adapters' other settings, of which what peft rejects may depend.

    Raises:
        UserError: there is no layer that can be adapted.
    """
    if not (isinstance(asked, str) and asked.lower() == ALL_LINEAR):
        return Choice(asked)
    key = type(model), model.config.to_json_string(), settings, getattr(model, "is_loaded_in_4bit", False)
    if key not in _CHOSEN:
        with torch.random.fork_rng([]):  # the adapters of the copies that are tried are drawn, too
            _CHOSEN[key] = _choose_of_all(model, asked, attempt)
    return _CHOSEN[key]


def _choose_of_all(model: Any, asked: str | list[str], attempt: Callable[[Any, str | list[str]], Any]) -> Choice:
    layers = _linear_layers(model)
    left_out = _unfit(model, layers)
    fit = [name for name in layers if name not in left_out]
    together: str | list[str] = fit if left_out else asked
    reason = _rejection(model, together, attempt)
    if reason is not None:
        together, rejected = _one_by_one(model, fit, attempt)
        left_out |= rejected
    if not together:
        raise UserError(
            f"LoRA cannot be added to {type(model).__name__}: peft rejects all of its linear layers ({reason})"
        )
    return Choice(together, left_out, everything=True)


def covered(model: Any, choice: Choice) -> set[str]:
    """The names of the layers that get an adapter where "all-linear" led to this choice."""
    return set(_linear_layers(model)) - choice.left_out.keys()


def report(adapted: Any, choice: Choice) -> Targets:
    """What has an adapter by now, and what has none and why.

    Args:
        adapted: a `peft.PeftModel`.

    Raises:
        UserError: a layer that was asked for has one that would fail, or have no effect.
    """
    base = adapted.get_base_model()
    layers = dict(adapted_layers(base))
    if not choice.everything and (unfit := _unfit(base, layers)):
        named = "; ".join(f"{name}: {reason}" for name, reason in patterns(unfit).items())
        raise UserError(f"LoRA cannot be added ({named}): leave these out of --model.lora.target_modules")
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        counts[pattern(_weight_name(name, layer))] = counts.get(pattern(_weight_name(name, layer)), 0) + 1
    if not choice.everything:
        return Targets(counts)
    without = {name: weight.numel() for name, weight in _weights_without(base, layers)}
    linear = _linear_layers(base)
    why = {name: _reason(name.removesuffix(".weight"), choice, linear) for name in without}
    total = sum(weight.numel() for name, weight in base.named_parameters() if "lora_" not in name)
    return Targets(counts, patterns(why), sum(without.values()) / total)


def check_used(network: Any, device: torch.device, vocabulary: int) -> None:
    """Check that each adapter takes part in a training pass on this device, whose kernels may read weights directly.

    Args:
        network: a `WeightedLM`.

    Raises:
        UserError: an adapter does not, so that it would be trained on nothing.
    """
    layers = dict(adapted_layers(network.base))
    ids = torch.arange(8, device=device)[None] % vocabulary
    training = network.training
    network.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            unused = _not_called(layers, lambda: network.decoder(input_ids=ids, use_cache=False))
    finally:
        network.train(training)
    if unused:
        named = ", ".join(dict.fromkeys(map(pattern, unused)))
        raise UserError(
            f"model.lora: {named} have adapters, but on {device.type} this model reads their weights without calling "
            "the layers, so that the adapters would not be trained: set --model.lora.target_modules to a list of "
            "layers without them"
        )


def _linear_layers(model: Any) -> dict[str, Any]:
    """Every linear layer but the output head and what adapters consist of, by name."""
    from transformers.pytorch_utils import Conv1D

    head, inside = model.get_output_embeddings(), tuple(f"{name}." for name, _ in adapted_layers(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.startswith(inside)
    }


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, by name; those around one parameter of another layer among them."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _weight_name(name: str, layer: Any) -> str:
    """The layer, or its one parameter, that has the adapter."""
    parameter = getattr(layer, "parameter_name", None)
    plain = name.replace(".base_layer", "")
    return plain if parameter is None else f"{plain}.{parameter}"


def _unfit(model: Any, layers: dict[str, Any]) -> dict[str, str]:
    """The layers that cannot be adapted whatever peft says, and why."""
    products = {name: layer for name, layer in layers.items() if not hasattr(layer, "parameter_name")}
    kinds: dict[Any, bool] = {}
    for layer in products.values():
        base = getattr(layer, "base_layer", layer)
        kinds.setdefault(type(base), _is_product(base))
    bad = {name for name, layer in products.items() if not kinds[type(getattr(layer, "base_layer", layer))]}
    shared = set(_sharing(products))
    left = {name: layer for name, layer in layers.items() if name not in bad | shared}
    read = _read_directly(model, left)
    return dict.fromkeys(bad, _NO_PRODUCT) | dict.fromkeys(shared, _SHARED) | dict.fromkeys(read, _READ)


def _sharing(layers: dict[str, Any]) -> Iterator[str]:
    """The layers whose weight is another's, too."""
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        owners.setdefault(id(getattr(layer, "base_layer", layer).weight), []).append(name)
    return (name for names in owners.values() if len(names) > 1 for name in names)


@torch.no_grad()
def _is_product(layer: Any) -> bool:
    """Whether the layer is called as a linear one, and is one: tried with another, small weight."""
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    known = owner.__module__.partition(".")[0] in _KNOWN_PLACES or owner.__module__ == "transformers.pytorch_utils"
    if owner is nn.Linear or known:
        return True
    with torch.device("cpu"):  # wherever others are made
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 5), (3, 5), (3,)))
        state = {"weight": weight} if layer.bias is None else {"weight": weight, "bias": bias}
        try:
            found = torch.func.functional_call(layer, state, (x,))
        except Exception:  # it does more with its input
            return False
        truth = F.linear(x, weight, state.get("bias"))
        return isinstance(found, Tensor) and found.shape == truth.shape and torch.allclose(found, truth)


def _rejection(model: Any, targets: str | list[str], attempt: Callable[[Any, str | list[str]], Any]) -> str | None:
    """Why peft does not adapt these layers, tried on a copy without weights; None where it does."""
    try:
        attempt(without_weights(model), targets)
    except ValueError as error:
        return " ".join(str(error).split()).partition(". ")[0][:200]
    except Exception:  # weights in 4 bits have no such copy
        return None
    return None


def _one_by_one(
    model: Any, fit: list[str], attempt: Callable[[Any, str | list[str]], Any]
) -> tuple[list[str], dict[str, str]]:
    """The layers that peft takes, and why not the others; those with the same last part of their name go together."""
    taken: list[str] = []
    rejected: dict[str, str] = {}
    for leaf in dict.fromkeys(name.rpartition(".")[2] for name in fit):
        group = [name for name in fit if name.rpartition(".")[2] == leaf]
        reason = _rejection(model, taken + group, attempt)
        if reason is None:
            taken += group
        else:
            rejected |= dict.fromkeys(group, f"rejected by peft: {reason}")
    return taken, rejected


def _read_directly(model: Any, layers: dict[str, Any]) -> set[str]:
    """Layers that a training pass does not call, where that can be found out by shapes."""
    training = model.training
    model.train()
    try:
        called: set[str] = set()
        with _watched(layers, called.add):
            run_in_shapes(model)
        return set(layers) - called
    except Exception:  # the family's code looks at values: `check_used` tells on the device
        return set()
    finally:
        model.train(training)


def _not_called(layers: dict[str, Any], run: Callable[[], Any]) -> set[str]:
    """The layers of which none with the same pattern is called; of experts some are not, by chance."""
    called: set[str] = set()
    with _watched(layers, lambda name: called.add(pattern(name))):
        run()
    return {name for name in layers if pattern(name) not in called}


@contextmanager
def _watched(layers: dict[str, Any], tell: Callable[[str], None]) -> Iterator[None]:
    """Tell of each layer that is called."""

    def note(name: str) -> Callable[..., None]:
        return lambda *_: tell(name)

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights_without(model: Any, layers: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Matrices and larger weights without adapter, but those of embeddings and head, by their names before peft."""
    ends = {id(model.get_output_embeddings().weight)}
    ends |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    named = {_weight_name(name, layer) for name, layer in layers.items()}
    for name, weight in model.named_parameters():
        plain = name.replace(".base_layer", "")
        adapted = plain in named or plain.removesuffix(".weight") in named
        copied = ".modules_to_save." in name or ".original_module." in name  # trained in full as it is
        if weight.ndim > 1 and "lora_" not in name and id(weight) not in ends and not (adapted or copied):
            yield plain, weight


def _reason(name: str, choice: Choice, linear: dict[str, Any]) -> str:
    return choice.left_out.get(name) or (_NOT_BY_PEFT if name in linear else _NOT_LINEAR)
