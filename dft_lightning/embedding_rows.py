"""Enlarging the embedding and the output head for tokens that were added to the tokenizer.

Shapes: V rows of the embedding, H hidden size.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.seeds import run_seed, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dft_lightning.loading import ModelSource
    from dft_lightning.scoring import WeightedModule


def rows_needed(tokenizer: "PreTrainedTokenizerBase", resize: bool | int) -> int | None:
    """How many rows the embedding needs at least, by `model.resize_embeddings`; None where it stays as it is.

    Args:
        tokenizer: whose ids, added tokens included, all get a row.
        resize: whether to enlarge at all; as a number, the rows are rounded up to a multiple of it.
    """
    if resize is False:
        return None
    multiple = 1 if resize is True else resize
    return -(-(largest_id(tokenizer) + 1) // multiple) * multiple


def largest_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id that the tokenizer gives, added and special tokens included."""
    return max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])


def prepare_source(module: "WeightedModule") -> "ModelSource":
    """The module's source, told what its weights depend on next to the checkpoint: the tokenizer, and the seed."""
    source = module.source
    source.seed = run_seed()
    if module.resize_embeddings is not False:
        source.embedding_rows = rows_needed(module.tokenizer, module.resize_embeddings)
    return source


def train_embeddings(model: Any) -> Any:
    """The model (a `PreTrainedModel`, or a `PeftModel` around one) with embedding and head to train, adapters or not.

    A new row that is frozen stays near the mean of the others, and its token means nothing.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not hasattr(layer, "original_module"):  # of modules_to_save a copy is trained
            layer.requires_grad_(True)
    return model


def check_resize(module: "WeightedModule") -> None:
    """Refuse what does not go with `model.resize_embeddings`, before anything is loaded."""
    resize = module.resize_embeddings
    if resize is False:
        return
    if resize < 1:
        raise UserError(f"model.resize_embeddings is {resize}; expected true, false, or a multiple of at least 1")
    if module.source.quantization is not None:
        raise UserError(
            "model.resize_embeddings trains the embedding and the head, but a checkpoint of a run with "
            f"model.quantization {module.source.quantization} holds adapters alone: leave quantization out"
        )
    if module.reference == "adapter_off":
        raise UserError(
            "model.reference is 'adapter_off', but with model.resize_embeddings the embedding and the head are trained "
            "next to the adapter, so that the model without it is not the initial one: use 'cache' or 'copy'"
        )


def config_with_rows(config: Any, rows: int | None) -> Any:
    """The configuration of a model whose embedding has been enlarged to so many rows."""
    if rows is None or config.get_text_config().vocab_size >= rows:
        return config
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = rows
    return config


def grow(model: Any, rows: int | None, seed: int) -> None:
    """Enlarge embedding and head to so many rows, in place; they never shrink.

    New rows are drawn around the mean of the old ones, by transformers (`mean_resizing`), from the seed: the same on
    all ranks, after a restart, and in a frozen copy.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if rows is None or rows <= before:
        return
    with seeded(seed):
        model.resize_token_embeddings(rows, mean_resizing=True)
    rank_zero_info(
        f"model.resize_embeddings: the embedding and the head have {rows:,} rows, {before:,} in the checkpoint; new "
        f"rows begin near the mean of the others (seed {seed})"
    )


def rows_stored(model: Any, weights: Mapping[str, Tensor]) -> int | None:
    """How many rows the embedding of a model like this has among stored weights; None where it is not among them."""
    table = model.get_input_embeddings()
    name = next(name for name, layer in model.named_modules() if layer is table)
    found = [weight for key, weight in weights.items() if key.endswith((f"{name}.weight", f"{name}.base_layer.weight"))]
    return found[0].shape[0] if found else None
