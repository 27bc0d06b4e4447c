"""Terms that a model's own configuration adds to its loss: the router loss is included, others are refused by name.

Names of settings are read first, before any weight is. Then the model's own loss on a few tokens is compared with what
is computed here, which finds terms that no name tells of, up to the rounding of a loss.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dft_lightning.errors import UserError
from dft_lightning.loading import load_config
from dft_lightning.own_loss import OwnLoss
from dft_lightning.router_loss import RouterLoss

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM
    from dft_lightning.module import FineTuner
    from dft_lightning.scoring import WeightedModule

RouterOption = float | Literal["auto", "none"]
"""The coefficient of the router loss: that of the model's configuration, none, or a number."""
UnsupportedLosses = Literal["refuse", "ignore"]
"""What to do about other terms of the model's own loss."""

#: What families call the coefficient; it counts where `output_router_logits` is set.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
#: Modules that predict further tokens, and were trained by a loss of their own; transformers leaves them out.
_MULTI_TOKEN = re.compile(r"nextn|mtp|multi_token|medusa")
#: Numbers that say how many such modules there are, and not what they look like.
_HOW_MANY = re.compile(r"num|^n_|use|loss|weight|lambda|coef")
#: Biases by which routers were balanced in pre-training, outside of any gradient.
_BALANCING_BIAS = re.compile(r"(correction_bias|expert_bias)$")
_OFF = "--model.router_loss none"
_IGNORE = "--model.unsupported_losses ignore"


def check_router_option(option: RouterOption) -> None:
    """Refuse a coefficient that is none."""
    if not isinstance(option, str) and not (math.isfinite(option) and option >= 0.0):
        raise UserError(f"model.router_loss is {option}; expected auto, none, or a number of at least 0")


def wants_router_loss(config: Any, option: RouterOption) -> bool:
    """Whether there is to be a router loss.

    Args:
        config: the model's configuration.
        option: model.router_loss.

    Raises:
        UserError: the model has no router.
    """
    text = config.get_text_config()
    if option == "auto":
        return bool(getattr(text, "output_router_logits", False)) and _configured(text) != 0.0
    if option == "none" or not option:
        return False
    if not hasattr(text, "output_router_logits"):
        raise UserError(
            f"model.router_loss is {option}, but {type(config).__name__} has no output_router_logits: this model "
            f"has no router, or transformers computes no loss of it. Set {_OFF}"
        )
    return True


def router_coefficient(base: Any, option: RouterOption) -> float:
    """The coefficient of the router loss of a model (a `PreTrainedModel`) that is to have one."""
    if not isinstance(option, str):
        return float(option)
    if (found := own_coefficient(base)) is None:
        raise UserError(
            f"{type(base.config).__name__}.output_router_logits asks for a router loss, but there is no coefficient: "
            "set --model.router_loss to one (transformers' usual default is 0.001), or to none"
        )
    return found


def own_coefficient(base: Any) -> float | None:
    """That by which the model multiplies its own router loss."""
    of_model = _configured(base)
    return _configured(base.config.get_text_config()) if of_model is None else of_model


def _configured(holder: Any) -> float | None:
    values = [getattr(holder, name, None) for name in _COEFFICIENTS]
    return next((float(value) for value in values if value is not None), None)


def unsupported_terms(config: Any) -> dict[str, Any]:
    """Settings of a configuration, by name, that ask for another term of the loss."""
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    return {name: value for name, value in sorted(settings.items()) if _asks_for_a_term(name, value)}


def _asks_for_a_term(name: str, value: Any) -> bool:
    if not isinstance(value, int | float) or not value or name in _COEFFICIENTS:
        return False
    if _MULTI_TOKEN.search(name):
        return _HOW_MANY.search(name) is not None
    return "loss" in name or "label_smoothing" in name


def refuse_unsupported(config: Any, option: UnsupportedLosses) -> None:
    """Refuse a configuration with such settings, unless they are ignored by request."""
    if (found := unsupported_terms(config)) and option == "refuse":
        raise UserError(
            f"{type(config).__name__} asks for terms of the loss that are not supported: {_listed(found)}. Set "
            f"{_IGNORE} to train without them"
        )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def refuse_terms(module: "WeightedModule") -> None:
    """Refuse, before any weight is read, what the configuration of a model that is to be trained asks for."""
    if module._trainer is not None and module.trainer.state.fn == "fit":
        config = load_config(module.base_source)
        refuse_unsupported(config, module.unsupported_losses)
        wants_router_loss(config, module.router_loss)


def prepare_loss_terms(module: "FineTuner") -> None:
    """Set the router loss of a fit that begins; what is in force is printed, and what is not supported refused."""
    network, option = module._network, module.unsupported_losses
    own, router = _probed(module)
    module.router = router
    if router is not None and module.compile_layers:
        raise UserError(
            "model.compile and a router loss do not go together: transformers cannot record the routers of compiled "
            f"layers. Set --model.compile false, or {_OFF}"
        )
    for line in _report(module, router):
        rank_zero_info(line)
    _compare(network, own, 0.0 if router is None else _own_term(network, own, router), option)


def router_for_scoring(module: "WeightedModule") -> RouterLoss | None:
    """The router loss of a validation or test outside of a fit."""
    wanted = wants_router_loss(module._network.base.config, module.router_loss)
    return _probed(module)[1] if wanted else None


def _probed(module: "WeightedModule") -> tuple[OwnLoss, RouterLoss | None]:
    base = module._network.base
    wanted = wants_router_loss(base.config, module.router_loss)
    with module.trainer.precision_plugin.forward_context():
        own = module._network.own_loss(wanted)
    return own, router_loss(base, own, router_coefficient(base, module.router_loss)) if wanted else None


def router_loss(base: Any, own: OwnLoss, coefficient: float) -> RouterLoss:
    """The router loss of a model (a `PreTrainedModel`).

    The number of experts that each token is sent to, which every family keeps under its own name, is that with which
    the formula gives the model's own router loss.

    Raises:
        UserError: the model has no router loss, or another one.
    """
    kind = type(base).__name__
    if own.balance is None or not own.router_logits:
        raise UserError(
            f"a router loss is asked for (by output_router_logits in the model's configuration, or model.router_loss), "
            f"but {kind} of this version of transformers computes none{f' ({own.skipped})' if own.skipped else ''}: "
            f"set {_OFF}"
        )
    if not math.isfinite(own.balance):
        raise UserError(f"the router loss of {kind} on eight tokens is {own.balance}: its weights are not finite")
    experts, balance = own.router_logits[0].shape[-1], own.balance
    flat = own.router_logits[0].dim() == 2
    each = {top_k: float(own.routing(top_k).balance) for top_k in range(1, experts + 1) if flat}
    top_k = min(each, key=lambda k: abs(each[k] - balance), default=0)
    if not (flat and abs(each[top_k] - balance) <= _balance_rounding(own)):
        raise UserError(
            f"{kind} has a router loss of its own kind ({balance:.6g} on eight tokens), which is not supported: set "
            f"{_OFF} to train without it"
        )
    return RouterLoss(coefficient, top_k)


def _balance_rounding(own: OwnLoss) -> float:
    """Of a router loss: some versions of transformers take means in the precision of the routers' logits."""
    return 8 * torch.finfo(own.router_logits[0].dtype).eps * abs(own.balance or 0.0)


def _own_term(network: "WeightedLM", own: OwnLoss, router: RouterLoss) -> float:
    """What the router loss adds to the model's own loss, by the coefficient of its configuration."""
    return (own_coefficient(network.base) or 0.0) * float(own.routing(router.top_k).balance)


def _compare(network: "WeightedLM", own: OwnLoss, known: float, option: UnsupportedLosses) -> None:
    """Refuse a model whose own loss has a term that is not computed here, unless it is ignored by request."""
    kind = type(network.base).__name__
    if own.skipped or not math.isfinite(own.loss):
        reason = own.skipped or f"it is {own.loss}"
        rank_zero_warn(f"the own loss of {kind} could not be compared with the loss of this run: {reason}")
        return
    difference = own.unknown(known, _balance_rounding(own) if own.router_logits else 0.0)
    if difference == 0.0:
        return
    if option == "refuse":
        raise UserError(
            f"the own loss of {kind} on eight tokens is {own.loss:.6g}, with a term of {difference:.3g} beyond cross "
            f"entropy{' and router loss' if known else ''}, which is not supported. Set {_IGNORE} to train without it"
        )
    rank_zero_info(f"Ignored by request: a term of {difference:.3g} in the own loss of {kind} on eight tokens")


def _report(module: "FineTuner", router: RouterLoss | None) -> list[str]:
    """What is printed of the terms of the loss: nothing for a model without any."""
    network, config = module._network, module._network.base.config
    lines = []
    if router is not None:
        origin = "the model's configuration" if module.router_loss == "auto" else "model.router_loss"
        lines.append(
            f"Router loss: coefficient {router.coefficient:g} ({origin}), {router.top_k} experts per token; logged as "
            "train/router_loss without the coefficient"
        )
    elif hasattr(config.get_text_config(), "output_router_logits"):
        asked = getattr(config.get_text_config(), "output_router_logits", False)
        lines.append(f"Router loss: none (model.router_loss {module.router_loss}, output_router_logits {asked})")
    if ignored := unsupported_terms(config):
        lines.append(f"Terms of the model's loss that are ignored by request: {_listed(ignored)}")
    state = [*network.base.named_parameters(), *network.base.named_buffers()]
    biases = {match.string.rpartition(".")[2] for name, _ in state if (match := _BALANCING_BIAS.search(name))}
    lines += [f"Routers' {name} stays as it is: transformers does not update it in training" for name in sorted(biases)]
    return lines
