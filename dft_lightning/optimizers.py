"""The optimizer of a run: built over the trained parameters, checked before it is used, and described as it is."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dft_lightning.errors import UserError
from dft_lightning.parameter_groups import Exempt, Kind, kinds_of, split

#: Optimizers of torch whose step needs what a run does not have.
_REFUSED = {
    "LBFGS": "evaluates the loss several times per step, on other weights each time",
    "SparseAdam": "takes sparse gradients only; those of a language model are dense",
}


@dataclass
class MuonAdamW:
    """AdamW's settings for what Muon does not take: embeddings, the output head, norms, and biases.

    Args:
        lr: its learning rate; the schedule scales it as it scales Muon's.
        betas: decay rates of its two moments.
        eps: added to the root of its second moment.
        weight_decay: decoupled weight decay.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01


class MuonWithAdamW(Optimizer):
    """Two optimizers of torch as one: Muon for matrices, AdamW for the rest; one state, one list of groups.

    Args:
        muon: over the matrices.
        adamw: over all other parameters.
    """

    def __init__(self, muon: Optimizer, adamw: Optimizer) -> None:
        self.parts = (muon, adamw)
        self._sizes = [len(part.param_groups) for part in self.parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": muon.defaults["lr"]})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups and state, which a schedule and a checkpoint change."""
        start = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[start : start + size]
            part.state = self.state
            start += size

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called where a checkpoint is loaded: the parts get its groups and state."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


@dataclass(frozen=True)
class Optimization:
    """How the trained parameters of a model get their optimizer.

    Args:
        make: the optimizer of a list of parameters, or of groups.
        muon_adamw: AdamW's settings where `make` gives Muon; None for the defaults.
        exempt: kinds of parameters without weight decay.
    """

    make: Callable[[Any], Optimizer]
    muon_adamw: MuonAdamW | None = None
    exempt: tuple[Exempt, ...] = ()

    @cached_property
    def _probe(self) -> Optimizer:
        """One over a small matrix, to read its class and options from."""
        return _built(self.make, [nn.Parameter(torch.zeros(2, 2))])

    def check(self) -> None:
        """Refuse what cannot work for any model."""
        kind = type(self._probe)
        named = next((c.__name__ for c in kind.__mro__ if c.__module__.startswith("torch.optim")), "")
        if named in _REFUSED:
            raise UserError(f"model.optimizer {kind.__name__} {_REFUSED[named]}: take another, such as AdamW")
        _check_values("model.optimizer", kind.__name__, self._probe.param_groups[0])
        if self.muon_adamw is not None and not self.is_muon:
            raise UserError(
                f"model.muon_adamw is given, but model.optimizer is {kind.__name__}: it is for torch.optim.Muon alone"
            )
        self._rest([nn.Parameter(torch.zeros(2))], [])
        if unknown := set(self.exempt) - {"norm", "bias", "embedding"}:
            raise UserError(f"model.weight_decay_exempt has {sorted(unknown)}; expected norm, bias, or embedding")
        if self.exempt and "weight_decay" not in self._probe.param_groups[0]:
            raise UserError(f"model.weight_decay_exempt: model.optimizer {kind.__name__} has no weight decay at all")

    @property
    def is_muon(self) -> bool:
        """Whether the optimizer takes matrices alone."""
        return isinstance(self._probe, torch.optim.Muon)

    @property
    def lr(self) -> float:
        """The learning rate before any schedule."""
        return float(self._probe.param_groups[0]["lr"])

    def build(self, model: Any) -> Optimizer:
        """The optimizer over the trained parameters of a model (a `PreTrainedModel`, or a `PeftModel` around one)."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kinds = kinds_of(model)
        if not self.is_muon:
            return _built(self.make, self._groups(trained, kinds))
        matrices = [parameter for parameter in trained if kinds[parameter] == "matrix"]
        rest = [parameter for parameter in trained if kinds[parameter] != "matrix"]
        if not matrices:
            raise UserError("model.optimizer Muon is for matrices, and no trained parameter is one: take AdamW")
        muon = _built(self.make, self._groups(matrices, kinds))
        if not rest and self.muon_adamw is not None:
            raise UserError("model.muon_adamw is given, but all trained parameters are Muon's: leave it out")
        return muon if not rest else MuonWithAdamW(muon, self._rest(*split(rest, kinds, self.exempt)))

    def _groups(self, parameters: Sequence[nn.Parameter], kinds: Mapping[nn.Parameter, Kind]) -> list[Any]:
        """Parameters, or their groups where some are exempt from weight decay."""
        return _grouped(*split(parameters, dict(kinds), self.exempt)) if self.exempt else list(parameters)

    def _rest(self, decayed: list[nn.Parameter], free: list[nn.Parameter]) -> Optimizer:
        options = self.muon_adamw or MuonAdamW()
        betas, decay = (float(options.betas[0]), float(options.betas[1])), options.weight_decay
        make = partial(torch.optim.AdamW, lr=options.lr, betas=betas, eps=options.eps, weight_decay=decay)
        made = _built(make, _grouped(decayed, free), "model.muon_adamw")
        _check_values("model.muon_adamw", "AdamW", made.param_groups[0])
        return made

    def over(self, small: nn.Parameter, kind: Kind = "matrix") -> Optimizer:
        """The optimizer that parameters of a kind get, over a small one alone."""
        return self._rest([small], []) if self.is_muon and kind != "matrix" else _built(self.make, [small])

    def check_device(self, device: torch.device) -> None:
        """Refuse an optimizer that cannot take a step on the run's device, by a step on a small matrix there.

        Raises:
            UserError: names the optimizer, and what it says.
        """
        small = nn.Parameter(torch.zeros(64, 64, device=device))
        small.grad = torch.full_like(small, 0.5)
        calls: list[None] = []

        def closure() -> Tensor:
            calls.append(None)
            return torch.zeros((), device=device)

        name = type(self._probe).__name__
        try:
            self.over(small).step(cast(Any, closure))
        except UserError:
            raise
        except Exception as error:  # optimizers of other packages share no class of error
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"model.optimizer {name} cannot take a step on {device.type}: {reason} — take another, such as AdamW"
            ) from error
        if len(calls) != 1:
            raise UserError(
                f"model.optimizer {name} evaluates the loss {len(calls)} times per step; here it is computed once: "
                "take another, such as AdamW"
            )


def _grouped(decayed: list[nn.Parameter], free: list[nn.Parameter]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _built(make: Callable[[Any], Optimizer], parameters: list[Any], option: str = "model.optimizer") -> Optimizer:
    """The optimizer; what its class does not take is said in one line that names the option."""
    try:
        made = make(parameters)
    except (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{_culprit(make, parameters, option)}: {reason}") from error
    if not isinstance(made, Optimizer):
        raise UserError(f"{option} gave a {type(made).__name__}; expected a torch.optim.Optimizer")
    return made


def _culprit(make: Any, parameters: list[Any], option: str) -> str:
    """The option without which the optimizer can be built, with its value; else the optimizer."""
    given = getattr(make, "keywords", {})
    for name, value in given.items():
        try:
            partial(make.func, *make.args, **{key: each for key, each in given.items() if key != name})(parameters)
        except Exception:  # it is another option's fault, or that of several
            continue
        return f"{option}.{name} is {value!r}"
    cls = next((each for each in getattr(make, "args", ()) if isinstance(each, type)), getattr(make, "func", make))
    return f"{option} {getattr(cls, '__name__', cls)}"


def _check_values(option: str, name: str, group: Mapping[str, Any]) -> None:
    lr = group.get("lr")
    if lr is None:
        raise UserError(
            f"{option} {name} sets its own learning rate, which model.lr_schedule cannot scale: give --{option}.lr 1e-3"
            + (f" --{option}.relative_step false" if "relative_step" in group else "")
        )
    if not (math.isfinite(float(lr)) and float(lr) >= 0.0):
        raise UserError(f"{option}.lr is {float(lr)}; expected a number of at least 0")
    for key in ("weight_decay", "eps"):
        value = group.get(key)
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0.0):
            raise UserError(f"{option}.{key} is {value}; expected a number of at least 0")
    if group.get("differentiable"):
        raise UserError(f"{option}.differentiable is true, but no gradient of a step is taken here: leave it out")


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers that one is made of."""
    return optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,)


def described(optimizer: Optimizer, settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Each group of an optimizer: class, options in force, and how many parameters it has.

    Args:
        settings: of each group, as `optimization.settings` has them.
    """
    kinds = [type(part).__name__ for part in parts_of(optimizer) for _ in part.param_groups]
    groups = zip(kinds, optimizer.param_groups, settings, strict=True)
    return [f"{kind}({_options(options)}) on {_count(group['params'])}" for kind, group, options in groups]


def _options(options: Mapping[str, Any]) -> str:
    named = {"lr" if key == "initial_lr" else key: value for key, value in options.items()}
    order = dict.fromkeys(("lr", "betas", "eps", "momentum", "weight_decay", *named))
    shown = {key: named[key] for key in order if named.get(key) is not None and named[key] is not False}
    shown.pop("decoupled_weight_decay", None)  # says how the class works
    return ", ".join(f"{key}={float(each) if isinstance(each, Tensor) else each}" for key, each in shown.items())


def _count(parameters: Sequence[nn.Parameter]) -> str:
    return f"{sum(each.numel() for each in parameters):,} parameters in {len(parameters):,} tensors"
