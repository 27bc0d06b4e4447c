"""Reading a causal language model, its configuration and its tokenizer from a folder or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from dft_lightning import embedded, varlen
from dft_lightning.adapter_folders import refuse_adapter
from dft_lightning.attention_choice import refuse_unsupported
from dft_lightning.checkpoint_keys import read_weights
from dft_lightning.embedding_rows import config_with_rows, grow
from dft_lightning.errors import UserError
from dft_lightning.quantization import Quantization, loading_options, make_exact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = "a local folder with config.json, weights and tokenizer, a name on the hub (with network)"
Precision = Literal["auto", "float64", "float32", "bfloat16", "float16"]


@dataclass
class ModelSource:
    """Where a model comes from and how it is held; see `FineTuner` for the meaning of each."""

    name: str
    dtype: torch.dtype = torch.float32
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None
    compute: torch.dtype = torch.float32
    """In what the products with quantized weights are computed."""
    allow_missing: list[str] = field(default_factory=list)
    """Names or glob patterns of weights that the checkpoint may lack, or have without use."""
    seed: int = 0
    """Of weights that are in no checkpoint."""
    embedding_rows: int | None = None
    """How many rows the embedding and the head are enlarged to; None for as many as the checkpoint has."""
    named_by: str = ""
    """What a message adds to the name, where it is not the user who gives it."""

    def path(self) -> str:
        """A folder or a hub name; the embedded model is converted here, on its first use."""
        return str(embedded.embedded_model()) if self.name == embedded.NAME else self.name


@contextmanager
def loading(what: str, source: ModelSource) -> Iterator[None]:
    """One clear line in place of what transformers, safetensors or the hub say."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and the hub share no class of error
        reason = " ".join(str(error).split())
        advice = f"give --model.model_name {_PLACES}, or {embedded.NAME!r}"
        if source.named_by:
            advice = f"set base_model_name_or_path there to {_PLACES}"
        raise UserError(
            f"cannot load the {what} of model {source.name!r}{source.named_by}: {reason[:300]} — {advice}"
        ) from error


def load_config(source: ModelSource) -> Any:
    """The model's configuration (a `PretrainedConfig`).

    Raises:
        UserError: it cannot be found or read.
    """
    from transformers import AutoConfig

    with loading("configuration", source):
        return AutoConfig.from_pretrained(
            source.path(), revision=source.revision, trust_remote_code=source.trust_remote_code
        )


def load_model(source: ModelSource, *, empty: bool = False) -> Any:
    """The causal language model (a `PreTrainedModel`), in training mode.

    Args:
        empty: without reading weights: to be called with the meta device as torch's own, it is a shape alone.

    Raises:
        UserError: it cannot be found or read, is an adapter, or does not know the attention implementation.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_adapter(source)
    varlen.register()
    auto: Any = AutoModelForCausalLM

    place: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    kind: dict[str, Any] = {"dtype": source.dtype, "attn_implementation": source.attn_implementation}
    if source.dtype == torch.float64:  # grouped products have no kernel in it
        kind["experts_implementation"] = "eager"
    if source.attn_implementation == varlen.NAME:
        refuse_unsupported(source)
    packed = {} if source.quantization is None else loading_options(source.quantization, source.compute)
    with loading("weights", source):
        model: Any
        if empty:
            config = config_with_rows(AutoConfig.from_pretrained(source.path(), **place), source.embedding_rows)
            model = auto.from_config(config, trust_remote_code=source.trust_remote_code, **kind)
        else:
            try:
                model = read_weights(auto.from_pretrained, source, kind | place | packed)
            except Exception:
                refuse_unsupported(source)
                raise
            make_exact(model)
            grow(model, source.embedding_rows, source.seed)
    return model.train()  # from_pretrained gives evaluation mode, which would switch off dropout and recomputation


def load_tokenizer(source: ModelSource, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer, with another chat template where one is given (a shipped name or a file).

    Raises:
        UserError: it cannot be found or read, or the template is unknown.
    """
    from transformers import AutoTokenizer

    from dft_lightning.data.rendering import load_chat_template
    from dft_lightning.data.tokenizer_checks import check_reads_text, warn_of_unknown_tokens

    with loading("tokenizer", source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path(), revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    check_reads_text(tokenizer, source.name)
    if chat_template is not None:
        tokenizer.chat_template = load_chat_template(chat_template)
        warn_of_unknown_tokens(tokenizer.chat_template, tokenizer)
    return tokenizer
