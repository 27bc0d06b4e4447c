"""What a model's tables can take, against the rows of a run: token ids by the embedding, positions by learned ones.

Checked on the model's metadata before any weight is read. Whether positions are limited is found by running the first
layer on them, not by the model's name: rotary models take any position, a table of learned ones does not.

Shapes: T tokens of a row.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dft_lightning.decoder import decoder_of
from dft_lightning.embedding_rows import largest_id
from dft_lightning.errors import UserError
from dft_lightning.loading import load_model

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.store import TokenizedRows
    from dft_lightning.scoring import WeightedModule


def check_limits(module: "WeightedModule", data: "ChatDataModule | None") -> None:
    """Refuse rows that would end the run at an index beyond one of the model's tables.

    Args:
        data: with the rows that the command reads; another kind of data module is not checked.

    Raises:
        UserError: with the largest id or position of the rows, the size of the table, and what to change.
    """
    names = ("train", "val", "test")
    rows = {name: found for name in names if (found := getattr(data, f"{name}_rows", None)) is not None}
    if not rows or data is None:
        return
    base = metadata_of(module)
    _check_ids(module, base, rows)
    _check_positions(base, rows)


def metadata_of(module: "WeightedModule") -> Any:
    """The transformers model: its shapes, without weights where they are not there yet."""
    if module.network is not None:
        return module.network.base
    source = replace(module.base_source, attn_implementation=None, quantization=None)  # neither changes a table
    with torch.device("meta"):
        return load_model(source, empty=True)


# -- token ids --------------------------------------------------------------------------------------------------------


def _check_ids(module: "WeightedModule", base: Any, rows: Mapping[str, "TokenizedRows"]) -> None:
    size, tokenizer = base.get_input_embeddings().weight.shape[0], module.tokenizer
    for stage, found in rows.items():
        if found.largest_id >= size:
            row = found.first_row_with_id_from(size)
            _refuse_id(module, size, found.largest_id, f"row {row} of the {stage} data has")
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= size:
        _refuse_id(module, size, pad, "rows are padded with")
    if (largest := largest_id(tokenizer)) >= size:
        rank_zero_warn(
            f"The tokenizer can give token ids up to {largest:,} ({_shown(tokenizer, largest)}), but the model's "
            f"embedding has {size:,} rows. No row of the data has such an id, but a prompt may: set "
            "--model.resize_embeddings true to give all of them a row"
        )
    if module.resize_embeddings is not False:
        _warn_of_special(tokenizer, max(found.largest_id for found in rows.values()))


def _warn_of_special(tokenizer: Any, used: int) -> None:
    """Warn where the last added token is special and above all ids in use: messages cannot contain such tokens."""
    last = largest_id(tokenizer)
    token = tokenizer.added_tokens_decoder.get(last)
    if last > used and token is not None and token.special:
        rank_zero_warn(
            f"model.resize_embeddings: no row of the data has the token id {last:,} ({_shown(tokenizer, last)}). It is "
            "a special token, and special tokens that are written in a message are read as text. If messages contain "
            "it, add it with special_tokens=False: tokenizer.add_tokens([...])"
        )


def _refuse_id(module: "WeightedModule", size: int, token: int, where: str) -> NoReturn:
    tokenizer = module.tokenizer
    needed = largest_id(tokenizer) + 1
    other = "" if module.tokenizer_name is None else f" (tokenizer_name is {module.tokenizer_name!r})"
    raise UserError(
        f"{where} the token id {token:,} ({_shown(tokenizer, token)}), but the embedding of {module.source.name!r} has "
        f"{size:,} rows, for ids up to {size - 1:,}: use the tokenizer of this model{other}; or, where tokens were "
        f"added to it, set --model.resize_embeddings true, which enlarges the embedding and the head to {needed:,} rows"
    )


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(token))


# -- positions --------------------------------------------------------------------------------------------------------


def _check_positions(base: Any, rows: Mapping[str, "TokenizedRows"]) -> None:
    """By the longest sequence of all stages: positions begin at 0 in each, packed or not, and are 0 in padding."""
    stage, most = max(((stage, found.longest) for stage, found in rows.items()), key=lambda pair: pair[1])
    window = window_of(base.config)
    if window is not None and most <= window:
        return
    limit = position_limit(base, most)
    if limit is not None:
        raise UserError(
            f"a row of the {stage} data has {most:,} tokens, but {type(base).__name__} has a table of {limit:,} "
            f"positions: set --data.max_length {limit}, by which longer rows are truncated (or, with --data.overlength "
            "drop, left out), or take a model for longer texts"
        )
    if window is not None:
        rank_zero_warn(
            f"A row of the {stage} data has {most:,} tokens, but config.json of the model names {window:,} positions "
            "(max_position_embeddings, and rope_parameters): the model is trained at positions that it has never seen. "
            f"Where that is not intended, set --data.max_length {window}, or rope scaling in config.json"
        )


def window_of(config: Any) -> int | None:
    """How many positions a configuration names, scaling of rotary positions included; None where it names none."""
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [part for part in found.values() if isinstance(part, Mapping)]  # one for each kind of layer
    for scaling in nested or [found]:
        if most is not None and scaling.get("factor") and scaling.get("rope_type", "default") != "default":
            most = max(most, int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or most)))
    return most


def position_limit(base: Any, positions: int) -> int | None:
    """How many positions a decoder takes, where these are fewer than `positions`; else None."""
    accepts = _probe(base)
    if not accepts(1) or accepts(positions):
        return None
    known, beyond = 1, positions  # so many are taken, and so many are not
    while beyond - known > 1:
        middle = (known + beyond) // 2
        known, beyond = (middle, beyond) if accepts(middle) else (known, middle)
    return known


def _probe(base: Any) -> Callable[[int], bool]:
    """Says whether so many positions get through the first layer of a model like this.

    Where it is told positions, by the last of them alone, on weights that are all one stored zero: beyond the end of a
    table there is no row. Where it is not (ALiBi), by the shapes of a row of that length.
    """
    config = copy.deepcopy(base.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = type(base)(config).eval()
    if "position_ids" in inspect.signature(decoder_of(model).forward).parameters:
        _fill_with_zeros(model)
        token = torch.zeros(1, 1).long()
        return lambda count: _passes(decoder_of(model), input_ids=token, position_ids=torch.tensor([[count - 1]]))
    return lambda count: _passes(decoder_of(model), input_ids=torch.zeros(1, count, device="meta").long())


def _fill_with_zeros(model: nn.Module) -> None:
    """Put tensors on the CPU in place of the meta device's, of which none takes memory."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = _zeros(tensor)  # type: ignore[assignment]


def _zeros(like: Tensor) -> Tensor:
    """One zero that is read at every place; never stored as a tensor of that size."""
    dtype = torch.float32 if like.is_floating_point() else like.dtype
    zeros = torch.zeros((), dtype=dtype).expand(like.shape)
    return nn.Parameter(zeros, requires_grad=False) if isinstance(like, nn.Parameter) else zeros


class _ZeroProducts(TorchFunctionMode):
    """Products with weights that are zero, without reading these: they would be copied to be multiplied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1:
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **(kwargs or {}))


class _LayerReachedError(Exception):
    """The first layer has run: no table was left."""


def _reached(*_: Any) -> NoReturn:
    raise _LayerReachedError


@torch.no_grad()
def _passes(decoder: nn.Module, **given: Tensor) -> bool:
    """Whether these inputs get through the first layer."""
    layers = next((part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part)), None)
    hook = None if layers is None else layers[0].register_forward_hook(_reached)
    try:
        with _ZeroProducts():
            decoder(**given, use_cache=False)
    except _LayerReachedError:
        return True
    except (IndexError, RuntimeError):  # what torch raises beyond the end of a table, or for shapes that do not fit
        return False
    finally:
        if hook is not None:
            hook.remove()
    return True
