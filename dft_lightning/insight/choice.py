"""Weightings as the user names them: a short name, file.Class, or class_path and init_args."""

from argparse import ArgumentError
from collections.abc import Iterable
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dft_lightning.data_weights import check_data_weights
from dft_lightning.errors import UserError
from dft_lightning.parser import class_hint
from dft_lightning.weighting import DFT, TokenWeighting, Uniform
from dft_lightning.weighting.proof import prove
from dft_lightning.weighting.spec import label


def chosen(specs: list[Any] | None, configured: TokenWeighting) -> dict[str, TokenWeighting]:
    """The weightings to compare, by what they are called; without `specs` the configured one and a usual handful.

    Raises:
        UserError: one of `specs` is not known, or cannot be computed from one pass over the data.
    """
    if specs is None:
        usual = (configured, Uniform(), DFT(), DFT(floor=0.1))
        return _by_label([weighting for weighting in usual if not why_not(weighting)])
    weightings = [weighting_of(spec, "weightings") for spec in specs]
    for weighting in weightings:
        refuse(weighting)
    return _by_label(weightings)


def _by_label(weightings: list[TokenWeighting]) -> dict[str, TokenWeighting]:
    """By what they are called; where two are called the same, the second by its module, too."""
    named: dict[str, TokenWeighting] = {}
    for weighting in weightings:
        name = label(weighting)
        if named.get(name, weighting) != weighting:
            name = f"{type(weighting).__module__}.{name}"
        named[name] = weighting
    return named


def weighting_of(spec: Any, option: str) -> TokenWeighting:
    """The weighting that the user wrote as the value of `option`.

    Args:
        spec: "DFT", "file.Class", {"class_path": …, "init_args": …}, or the latter as a YAML text.
        option: for the error.
    """
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            spec = yaml.safe_load(spec)
        except yaml.YAMLError as error:
            raise UserError(f"--{option} {spec!r} is not YAML: {error}") from error
    spec = spec.as_dict() if hasattr(spec, "as_dict") else spec
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--weighting", type=TokenWeighting)
    try:
        built = parser.instantiate_classes(parser.parse_object({"weighting": spec})).weighting
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_why(spec, option, error)) from error
    if not isinstance(built, TokenWeighting):
        raise UserError(f"--{option} {spec!r} is no weighting; expected a name, or class_path and init_args")
    return built


def _why(spec: Any, option: str, error: Exception) -> str:
    """A name that is not known gets those that are; anything else its own reason."""
    name = spec.get("class_path", spec) if isinstance(spec, dict) else spec
    text = " ".join(str(error).split())
    if "dot import path" in text or "import" in text.lower():
        return (class_hint("model.weighting", str(name)) or text).replace("model.weighting", option)
    return f"--{option} {name!r}: {text[:300]}"


def why_not(weighting: TokenWeighting) -> str:
    """Why the weights cannot be told from one pass over the data; "" where they can."""
    name = type(weighting).__name__
    try:
        prove(weighting)
    except ValueError as error:
        return f"weighting refused: {error}"
    if "reward" in weighting.needs:
        return f"{name} needs rewards, which come with rows that a policy has written"
    if weighting.vocabulary and weighting.scope != "token":
        return f"{name} has a target over the whole vocabulary, and looks at other tokens: one pass does not tell both"
    return ""


def refuse_data(weightings: Iterable[TokenWeighting], configured: TokenWeighting, data: Any) -> None:
    """As a fit refuses: data with weights that the configured weighting passes over; or none, where one needs them."""
    check_data_weights(configured, data, "predict")
    for weighting in weightings:
        if "data_weight" in weighting.needs:
            check_data_weights(weighting, data, "predict")


def refuse(weighting: TokenWeighting) -> None:
    """A UserError where the weights cannot be told from one pass over the data."""
    if reason := why_not(weighting):
        raise UserError(reason)
