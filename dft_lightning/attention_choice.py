"""Which attention implementations a model supports: tried on the model itself, so that advice names what works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dft_lightning import varlen
from dft_lightning.attention import apart, bound, distance, foresight, implementation_of, states_alone
from dft_lightning.decoder import decoder_of
from dft_lightning.errors import UserError

if TYPE_CHECKING:
    from dft_lightning.loading import ModelSource

#: What is tried, in the order in which it is advised.
_CANDIDATES = ("varlen", "flash_attention_2", "sdpa", "eager")
#: What needs no package or device that may be on another machine only.
_EVERYWHERE = ("eager", "sdpa", "varlen")


def check_causal(model: Any, vocabulary: int) -> None:
    """Check on this very model that no token sees a later one, and that `varlen` computes what `eager` does.

    Raises:
        UserError: it names the attention implementation, and those with which the model passes.
    """
    if "flash" in implementation_of(decoder_of(model)) and model.device.type == "cpu":
        return  # its kernels are those of the GPU to which the model is moved
    if (reason := _fault(model, vocabulary, packed=False)) is not None:
        raise UserError(f"{_named(model)} {reason}: {_advice(model, vocabulary, packed=False)}")


def check_boundaries(model: Any, vocabulary: int) -> None:
    """Check on this very model that packed documents get the hidden states that each has alone, padding included.

    Raises:
        UserError: they do not, so packing would change what is learnt; it names the implementations that would not.
    """
    if (reason := _fault(model, vocabulary, packed=True)) is not None:
        raise UserError(f"data.packing: {_named(model)} {reason}: {_advice(model, vocabulary, packed=True)}")


def passing(model: Any, vocabulary: int, *, packed: bool) -> list[str]:
    """The other attention implementations with which this very model passes the checks; it is left as it was.

    Args:
        model: a `PreTrainedModel`.
        packed: whether rows hold several documents.
    """
    return [name for name in _CANDIDATES if _passes(model, vocabulary, name, packed)]


def unsupported(name: str, build: Callable[[str | None], Any]) -> str | None:
    """Why a model cannot be built with this implementation, where it can be with the default one; else None.

    Args:
        build: makes the model without weights, with a given implementation.
    """
    varlen.register()
    try:
        default = build(None)
    except Exception:  # the implementation is not what is wrong
        return None
    try:
        build(name)
        if name == varlen.NAME:
            with running(default, name):
                pass
    except Exception as error:  # each family says so in another way
        return (
            f"model.attn_implementation is {name!r}, which {type(default).__name__} does not support "
            f"({_short(error)}): leave it out, which means {implementation_of(default)} here"
        )
    return None


def refuse_unsupported(source: "ModelSource") -> None:
    """Refuse an attention implementation with which this model cannot be loaded, where that is what is wrong.

    Raises:
        UserError: it names the implementation that this model has by default.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM

    def build(attention: str | None) -> Any:
        trusted = {"trust_remote_code": source.trust_remote_code}
        config = AutoConfig.from_pretrained(source.path(), revision=source.revision, **trusted)
        with torch.device("meta"):
            return auto.from_config(config, attn_implementation=attention, **trusted)

    name = source.attn_implementation
    if name is not None and (reason := unsupported(name, build)) is not None:
        raise UserError(reason)


def built(build: Callable[[str | None], Any], asked: str | None, instead: str | None) -> Any:
    """A model without weights, with what stands for the implementation asked for, or its own where it takes none.

    Args:
        build: makes the model, with a given implementation.
        instead: what stands for `asked`.

    Raises:
        UserError: the model does not support the one that is asked for.
    """
    if asked in _EVERYWHERE and (reason := unsupported(str(asked), build)) is not None:
        raise UserError(reason)
    if instead is None or instead in _EVERYWHERE:
        return build(instead)
    try:
        return build(instead)
    except Exception:  # each family says in another way that it takes none
        return build(None)


def _named(model: Any) -> str:
    return f"attention {implementation_of(decoder_of(model))!r} of {type(decoder_of(model)).__name__}"


def _advice(model: Any, vocabulary: int, *, packed: bool) -> str:
    others = " or ".join(passing(model, vocabulary, packed=packed))
    if not packed:
        return f"set --model.attn_implementation to {others}" if others else "this model is not supported"
    if others:
        return f"set --model.attn_implementation to {others}, or --data.packing to false"
    return "no other implementation that was tried on this model does better: set --data.packing to false"


def _fault(model: Any, vocabulary: int, *, packed: bool) -> str | None:
    """What is wrong with the model's present implementation, as the end of a sentence."""
    decoder = decoder_of(model)
    try:
        off = apart(decoder, vocabulary) if packed else foresight(decoder, vocabulary)
        differs = 0.0 if packed else _from_eager(model, vocabulary)
    except torch.OutOfMemoryError:
        raise
    except UserError as error:
        return f"does not work on this model ({error})"
    except Exception as error:  # each family, and each library that it uses, fails in another way
        return f"cannot run{' on packed sequences' if packed else ''} ({_short(error)})"
    if not differs <= bound(decoder):
        return f"computes something else than eager attention (hidden states are off by {differs:.1%})"
    if off <= bound(decoder):
        return None
    what = "packed sequences see each other" if packed else "tokens see later ones"
    return f"lets {what} (their hidden states are off by {off:.1%})"


def _from_eager(model: Any, vocabulary: int) -> float:
    """How far the hidden states of `varlen`, which transformers does not know, are from those of eager attention."""
    decoder = decoder_of(model)
    if implementation_of(decoder) != varlen.NAME:
        return 0.0
    found = states_alone(decoder, vocabulary)
    try:
        with running(model, "eager"):
            truth = states_alone(decoder, vocabulary)
    except ValueError:  # this family cannot be compared
        return 0.0
    return distance(found, truth)


def _passes(model: Any, vocabulary: int, name: str, packed: bool) -> bool:
    if name == implementation_of(decoder_of(model)):
        return False
    try:
        with running(model, name):
            checks = [packed, False] if packed else [False]
            return all(_fault(model, vocabulary, packed=each) is None for each in checks)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it is not supported, or what it needs is not installed
        return False


@contextmanager
def running(model: Any, name: str) -> Iterator[None]:
    """Another attention implementation for a while.

    Raises:
        ValueError: the model does not take it while it is there, or not at all.
    """
    from transformers import logging

    before, told = implementation_of(decoder_of(model)), logging.get_verbosity()
    logging.set_verbosity(40)  # errors alone
    try:
        model.set_attn_implementation(name)
        if implementation_of(decoder_of(model)) != name:
            raise ValueError(f"{type(model).__name__} does not change its attention implementation")
        yield
    finally:
        model.set_attn_implementation(before)
        logging.set_verbosity(told)


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
