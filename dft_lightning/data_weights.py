"""Weights that come with the data are honoured or refused: never passed over, never made up."""

from typing import Any

from dft_lightning.errors import UserError
from dft_lightning.weighting import TokenWeighting

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("train",)}


def check_data_weights(weighting: TokenWeighting, data: Any, command: str) -> None:
    """Refuse rows with weights that the weighting does not ask for, and rows to train on without those it needs.

    Rows that are only scored may have none: then each counts 1.

    Args:
        data: a `ChatDataModule` that has been set up; of any other, nothing is known.
        command: "fit", "validate", "test" or "predict".
    """
    if not hasattr(data, "columns"):
        return
    name, column = type(weighting).__name__, data.columns.weight
    wrapped = f"--model.weighting DataWeighted --model.weighting.of {name}"
    found = {stage: getattr(data, f"{stage}_rows") for stage in _STAGES[command]}
    reports = {stage: rows.report for stage, rows in found.items() if rows is not None}
    if "data_weight" not in weighting.needs and column is not None:
        raise UserError(f"data.weight is {column!r}, but {name} asks for no weights: use {wrapped}, or leave it out")
    for stage, report in reports.items():
        if "data_weight" not in weighting.needs and report.unequal:
            raise UserError(
                f"{report.weighted} {stage} rows have weights at their messages, but {name} asks for none: use "
                f"{wrapped}, or pass over them with --data.message_weights false"
            )
        if "data_weight" in weighting.needs and stage == "train" and not report.weighted:
            raise UserError(
                f"{name} needs weights of the data, but no training row has any: name their column in data.weight, or "
                "give assistant messages a key weight"
            )
