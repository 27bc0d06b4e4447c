"""Training a part of the weights: which parameters are frozen, by patterns of their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dft_lightning.errors import UserError

_OF_PEFT = "base_model.model."


@dataclass(frozen=True)
class Freezing:
    """Patterns as the shell's (`*`, `?`, `[0-3]`) of the names that transformers gives to parameters.

    Args:
        freeze: what is not trained.
        train_only: what alone is trained, less what `freeze` names; everything where it is empty.
    """

    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.freeze or self.train_only)

    def apply(self, model: Any) -> Any:
        """The model with these parameters frozen, in place; one that has two names (tied weights) goes by either.

        Raises:
            UserError: a pattern matches no name, or nothing is left to train.
        """
        names = _names(model)
        for option, patterns in (("freeze", self.freeze), ("train_only", self.train_only)):
            for pattern in patterns:
                matched = _matching(names, [pattern])
                if option == "train_only":
                    matched = [parameter for parameter in matched if parameter.requires_grad]
                if not matched:
                    raise UserError(_no_match(option, pattern, names))
        for parameter in self.frozen(model):
            parameter.requires_grad_(False)
        if self and not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                f"model.freeze {list(self.freeze)} and model.train_only {list(self.train_only)} leave no parameter to "
                "train: name fewer in model.freeze, or others in model.train_only"
            )
        return model

    def frozen(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that the patterns freeze."""
        names = _names(model)
        ids = {id(parameter) for parameter in _matching(names, self.freeze)}
        if self.train_only:
            kept = {id(parameter) for parameter in _matching(names, self.train_only)}
            ids |= {id(parameter) for parameter, _ in names} - kept
        return [parameter for parameter in model.parameters() if id(parameter) in ids]

    def also_frozen(self, model: nn.Module) -> list[str]:
        """Names that no pattern of `freeze` matches, of tensors that another name of theirs freezes (tied weights)."""
        names = _names(model)
        ids = {id(parameter) for parameter in _matching(names, self.freeze)}
        return [name for parameter, name in names if id(parameter) in ids and not _is_in(name, self.freeze)]


#: Everything is trained.
NOTHING = Freezing()


def freezing_of(freeze: Sequence[str] | None, train_only: Sequence[str] | None) -> Freezing:
    """By the options of `FineTuner`."""
    for option, patterns in (("freeze", freeze), ("train_only", train_only)):
        if isinstance(patterns, str):
            raise UserError(f"model.{option} is {patterns!r}; expected a list of patterns, as '[{patterns}]'")
    return Freezing(tuple(freeze or ()), tuple(train_only or ()))


def _names(model: Any) -> list[tuple[nn.Parameter, str]]:
    found = model.named_parameters(remove_duplicate=False)
    return [(parameter, name.removeprefix(_OF_PEFT)) for name, parameter in found]


def _is_in(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.removeprefix(_OF_PEFT)) for pattern in patterns)


def _matching(names: Sequence[tuple[nn.Parameter, str]], patterns: Sequence[str]) -> list[nn.Parameter]:
    return [parameter for parameter, name in names if _is_in(name, patterns)]


def _no_match(option: str, pattern: str, names: Sequence[tuple[nn.Parameter, str]]) -> str:
    trained = [name for parameter, name in names if parameter.requires_grad]
    below = [name for name in trained if name.startswith(f"{pattern}.")]
    hint = f"did you mean {pattern + '.*'!r}?" if below else f"its names are such as {', '.join(trained[:2])}"
    what = "parameter" if option == "freeze" else "trainable parameter"
    return f"model.{option} {pattern!r} matches no {what} of the model: {hint}"
