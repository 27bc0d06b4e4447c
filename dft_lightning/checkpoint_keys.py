"""Reading a checkpoint's weights so that each weight of the model is read, and each weight of the file is used.

`from_pretrained` draws weights that are missing from a checkpoint at random, and drops those that the model has no
place for. Here both are refused by name, unless `model.allow_missing` names them.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.seeds import seeded

if TYPE_CHECKING:
    from dft_lightning.loading import ModelSource

_SHOWN = 8  # groups of names in a message
_MASKS = {"bias", "masked_bias", "causal_mask"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Differences:
    """What differs between a checkpoint and the model that is built from its configuration.

    Args:
        missing: weights of the model that the checkpoint lacks.
        unused: weights of the checkpoint that the model has no place for.
        mismatched: by name, the shape in the checkpoint and the shape in the model.
    """

    missing: frozenset[str]
    unused: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @staticmethod
    def of(info: Mapping[str, Any], model: Any) -> "Differences":
        """From the loading info of transformers, which has left out what the model's class declares as optional.

        What the model computes itself (rotary frequencies, causal masks) is no weight, though older files have it.
        """
        buffers = {name for name in info["unexpected_keys"] if _is_computed(name, model)}
        mismatched = {name: (tuple(file), tuple(own)) for name, file, own in info["mismatched_keys"]}
        return Differences(frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]) - buffers, mismatched)

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.missing | self.unused | self.mismatched.keys()

    def without(self, patterns: Iterable[str]) -> "Differences":
        """Those that none of the glob patterns matches."""
        left = {name for name in self.names if not any(fnmatchcase(name, pattern) for pattern in patterns)}
        mismatched = {name: shapes for name, shapes in self.mismatched.items() if name in left}
        return Differences(self.missing & left, self.unused & left, mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.missing)} missing from it: {abbreviated(self.missing)}"] if self.missing else []
        unused = f"{len(self.unused)} in it that the model does not use: {abbreviated(self.unused)}"
        parts += [unused] if self.unused else []
        shapes = {f"{name} {file}, not {own}" for name, (file, own) in self.mismatched.items()}
        parts += [f"{len(shapes)} of another shape in it: {abbreviated(shapes)}"] if shapes else []
        return "; ".join(parts)


def read_weights(from_pretrained: Callable[..., Any], source: "ModelSource", options: Mapping[str, Any]) -> Any:
    """The model with the checkpoint's weights (a `PreTrainedModel`).

    What `source.allow_missing` names and the checkpoint lacks is initialised by the model's own rule from
    `source.seed`, so that all ranks, restarts and frozen copies have the same.

    Raises:
        UserError: weights are missing, unused, of another shape, tied in the configuration but not in the file, or not
            finite; or `allow_missing` names what is not missing.
    """
    with seeded(source.seed), _without_report():
        model, info = from_pretrained(source.path(), **options, output_loading_info=True, ignore_mismatched_sizes=True)
    check_names(Differences.of(info, model), type(model).__name__, source)
    check_ties(model, source)
    check_finite(model, source)
    return model


def check_names(found: Differences, kind: str, source: "ModelSource") -> None:
    """Refuse differences that `model.allow_missing` does not name; those that it names are printed."""
    allowed = source.allow_missing
    if wrong := [each for each in allowed if not any(fnmatchcase(name, each) for name in found.names)]:
        raise UserError(
            f"model.allow_missing names {wrong}, but nothing of that name is missing from the checkpoint of "
            f"{source.name!r}, unused in it, or of another shape: leave that out"
        )
    refused = found.without(allowed)
    if refused.names:
        raise UserError(
            f"the checkpoint of {source.name!r} and its config.json ({kind}) differ in their weights: {refused}. What "
            f"is missing would start at random values, and what is unused would be lost.{_hint(refused)} Correct the "
            "checkpoint or its config.json; or, to initialise or leave out these weights on purpose, set "
            f"--model.allow_missing '{_patterns(refused if not allowed else found)}'"
        )
    for text in _allowed(found, source):
        rank_zero_info(text)


def _allowed(found: Differences, source: "ModelSource") -> Iterator[str]:
    """What is said of differences that are allowed."""
    fresh = found.missing | found.mismatched.keys()
    if fresh:
        yield (
            f"model.allow_missing: {len(fresh)} weights are not in the checkpoint of {source.name!r}; initialised from "
            f"seed {source.seed}: {abbreviated(fresh)}"
        )
    if found.unused:
        yield (
            f"model.allow_missing: {len(found.unused)} weights of the checkpoint of {source.name!r} are left out: "
            f"{abbreviated(found.unused)}"
        )


def _is_computed(name: str, model: Any) -> bool:
    """Whether this is a buffer of the model, or of an earlier version: a mask was a `bias` of the attention itself."""
    owner, _, own = name.rpartition(".")
    composed = (where for where, module in model.named_modules() if next(module.children(), None) is not None)
    is_mask = own in _MASKS and any(f".{where}".endswith(f".{owner}") for where in composed if where)
    return is_mask or any(name == buffer for buffer, _ in model.named_buffers())


def _hint(found: Differences) -> str:
    """The likely cause, where it can be seen."""
    prefixes = {
        unused[: -len(name)] for name in found.missing for unused in found.unused if unused.endswith(f".{name}")
    }
    if len(prefixes) == 1:
        return (
            f" The checkpoint's names begin with {prefixes.pop()!r}, as those of a wrapped or compiled model do: save "
            "the model inside the wrapper."
        )
    if found.names == {"lm_head.weight"} and found.missing:
        return " If the output head is to share the embedding's weights, set tie_word_embeddings true in config.json."
    return ""


def check_ties(model: Any, source: "ModelSource") -> None:
    """Refuse weights that the configuration ties, where the checkpoint has both, and they differ.

    transformers then unties them, which a sharded model or an export that is built from the configuration would not.
    """
    expected = getattr(model, "get_expanded_tied_weights_keys", None)  # by target, the weight that it shares
    pairs = {} if expected is None else expected(all_submodels=True)
    held = dict(model.named_parameters(remove_duplicate=False))
    apart = [f"{one} and {two}" for one, two in pairs.items() if held.get(one) is not held.get(two)]
    if apart:
        raise UserError(
            f"config.json of {source.name!r} ties weights (tie_word_embeddings true), but its checkpoint has both of "
            f"{', '.join(apart)}, with different values: set tie_word_embeddings false in config.json to use both, or "
            "remove the one that is not meant from the checkpoint"
        )


def check_finite(model: Any, source: "ModelSource") -> None:
    """Refuse weights that are NaN or infinite: every loss would be, too."""
    weights = {name: weight for name, weight in model.named_parameters() if _is_checked(weight)}
    if wrong := [name for name, weight in weights.items() if not _is_finite(weight)]:
        raise UserError(
            f"the checkpoint of {source.name!r} has NaN or infinite values in {len(wrong)} weights: "
            f"{abbreviated(wrong)}. Take an undamaged copy, or an earlier checkpoint of the run that wrote it"
        )


def _is_checked(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize > 1 and weight.numel() > 0 and weight.device.type != "meta"


@torch.no_grad()
def _is_finite(weight: Tensor) -> bool:
    """By the extremes, NaN where there is one: a pass at 4 GB/s of one core, a tenth of the time of `isfinite`."""
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight))


def abbreviated(names: Iterable[str]) -> str:
    """Names that differ in numbers alone as one, with their count: model.layers.{0–31}.mlp.up_proj.weight (32)."""
    shown = [_as_one(members) for members in _kinds(names).values()]
    rest = f", and {len(shown) - _SHOWN} more kinds" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + rest


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their glob pattern, in which a star stands for each number."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    return groups


def _as_one(names: list[str]) -> str:
    """Names of one kind, with the first and the last of each number."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = iter(
        [
            str(min(column)) if len({*column}) == 1 else f"{{{min(column)}–{max(column)}}}"
            for column in map(list, columns)
        ]
    )
    return f"{_NUMBER.sub(lambda _: next(ranges), names[0])} ({len(names)})"


def _patterns(found: Differences) -> str:
    """A list for --model.allow_missing that names them all: by kind, or by what all begin with where kinds are many."""
    kinds = [*_kinds(found.names)]
    if len(kinds) > _SHOWN:
        first, last = min(found.names), max(found.names)
        same = next(place for place, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1)
        kinds = [f"{first[:same]}*"]
    return json.dumps(kinds)


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers logs a table of the differences, which are refused or printed here."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
