"""Greedy answers of a model to many prompts, in batches.

Shapes: B prompts a batch, T tokens of the longest prompt in it, L tokens of it together with its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_ids: Sequence[int] = (),
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model greedily continues each prompt with, in the order of `prompts`.

    Prompts are taken as they are (they come from a chat template, which wrote the special tokens). An answer ends
    before the tokenizer's end-of-sequence token or one of `stop_ids`, or after `max_new_tokens`. Model and tokenizer
    are left as they were. `on_batch` is told after each batch how many prompts are done, and of how many.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}.")
    token_ids = _tokenized(tokenizer, prompts)
    stops = sorted({*stop_ids, *_ids(tokenizer.eos_token_id)})
    # Longest first: little padding within a batch, and a batch that does not fit the memory is the first one.
    order = sorted(range(len(prompts)), key=lambda i: -len(token_ids[i]))
    answers = [""] * len(prompts)
    with _greedy_inference(model, _greedy_config(tokenizer, max_new_tokens, stops)):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            new_ids = _continue(model, [token_ids[i] for i in batch])
            for i, ids in zip(batch, new_ids.tolist(), strict=True):
                answers[i] = str(tokenizer.decode(_until_stop(ids, stops), clean_up_tokenization_spaces=False))
            if on_batch:
                on_batch(start + len(batch), len(order))
    return answers


def _tokenized(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    if not prompts:
        return []
    token_ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    if empty := [i for i, ids in enumerate(token_ids) if not ids]:
        raise UserError(f"There is nothing to continue in prompt {empty[0]}: it has no token. Give each prompt a text.")
    return token_ids


def _ids(token_id: int | list[int] | None) -> list[int]:
    return token_id if isinstance(token_id, list) else [] if token_id is None else [token_id]


def _greedy_config(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stops: list[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    pads = [*_ids(tokenizer.pad_token_id), *stops, 0]  # any id will do: it is masked before the prompt, cut off behind
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pads[0],
        use_cache=True,  # also where training has switched `config.use_cache` off
    )


@contextmanager
def _greedy_inference(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Without dropout and with `config` as the model's only generation settings; afterwards all is as it was.

    Settings that are merely passed to `model.generate` are completed from the model's own, and a repetition penalty or
    a list of suppressed tokens is then no longer greedy.
    """
    wrapped = getattr(model, "get_base_model", None)  # an adapter hands the request on to the model it wraps
    owner = wrapped() if wrapped else model
    training = {module: module.training for module in model.modules()}  # a submodule may be frozen in evaluation mode
    own_config = owner.generation_config
    owner.generation_config = config
    model.train(False)
    try:
        yield
    finally:
        owner.generation_config = own_config
        for module, flag in training.items():
            module.training = flag


def _continue(model: PreTrainedModel, token_ids: list[list[int]]) -> Tensor:
    """The new tokens of each row, padded behind: (B, L − T)."""
    longest = max(map(len, token_ids))
    pad_id = model.generation_config.pad_token_id
    rows = [[pad_id] * (longest - len(ids)) + ids for ids in token_ids]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in token_ids]
    output: Tensor = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(rows, device=model.device),  # (B, T)
        attention_mask=torch.tensor(mask, device=model.device),  # (B, T)
    )  # (B, L)
    return output[:, longest:]


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
