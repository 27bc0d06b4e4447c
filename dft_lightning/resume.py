"""What makes a run the run it is: kept in its checkpoints, and compared before one is gone on with."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dft_lightning.adapter_names import of_adapter
from dft_lightning.averaging import averaging_in_words, averaging_of
from dft_lightning.errors import UserError
from dft_lightning.precision import precision_of
from dft_lightning.weighting.proof import fingerprint

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

Change = Literal["model", "tokenizer", "data", "weighting", "normalize", "averaging"]
"""What `allow_changes` can name: a run may go on with another one of these if its user says so."""

CHECKPOINT_KEY = "dft_lightning"
"""Where a checkpoint holds the facts below."""

Identity = dict[str, dict[str, Any]]
"""By kind (a `Change`, or what can never change), what it consists of."""

_OF_THE_VERSION = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "quantization_config",
)


#: Options that decide which parameters an optimizer has, and in which of its groups.
_OF_PARAMETERS = ("freeze", "train_only", "weight_decay_exempt")


def identity_by_options(hparams: Mapping[str, Any]) -> Identity:
    """What the options of a `FineTuner` say that it optimises; known before anything is loaded."""
    return {
        "model": {"name": _place(hparams["model_name"]), "adapter": hparams.get("adapter")},
        "weighting": {"": hparams["weighting"], "router loss": _unless_default(hparams.get("router_loss"))},
        "normalize": {"": hparams["normalize"]},
        "lora": {"": _lora(hparams["lora"]), "quantization": hparams.get("quantization")}
        | {"resize_embeddings": hparams.get("resize_embeddings") or None},
        "parameters": {name: hparams.get(name) or None for name in _OF_PARAMETERS},
        "tokenizer": {"name": _place(hparams["tokenizer_name"]), "chat template": hparams["chat_template"]},
    }


def _unless_default(router_loss: float | str | None) -> float | str | None:
    """A checkpoint from before there was such an option does not name it."""
    return None if router_loss == "auto" else router_loss


def _lora(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Without what is off, which a checkpoint from before there was such an option does not name.

    And without the precision of the adapters: it may change, which is said; see `settings_of`.
    """
    known = {name: value for name, value in (options or {}).items() if value not in (None, False) and name != "dtype"}
    return known if options else None


def identity(module: "FineTuner") -> Identity:
    """That, and sha256 of what the names stand for: they may hold something else by now."""
    assert module.network is not None
    config = {key: value for key, value in module.network.base.config.to_dict().items() if key not in _OF_THE_VERSION}
    tokenizer = module.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # not there where the tokenizer is slow
    # truncation and padding, which stand before the added tokens, are left there by whoever called it last
    vocabulary = backend.to_str().partition('"added_tokens"')[2] if backend else tokenizer.get_vocab()
    found = identity_by_options(module.hparams)
    found["model"]["weights left out of checkpoints"] = module.network.left_out
    found["model"]["architecture"] = _sha256(json.dumps(config, sort_keys=True, default=str))
    found["tokenizer"]["content"] = _sha256(repr([vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]))
    found["weighting"]["content"] = fingerprint(module.weighting)
    averaging = averaging_of(module.trainer)
    found["averaging"] = {"": None if averaging is None else averaging.state_key}
    found["data"] = getattr(getattr(module.trainer, "datamodule", None), "identity", dict)()
    return found


def settings_of(module: "FineTuner") -> dict[str, Any]:
    """What may change between two parts of a run, and is said."""
    trainer, network = module.trainer, module.network
    assert network is not None
    return {
        "steps": module.total_steps,
        "seed": module.seed,
        "lr_schedule": module.lr_schedule,
        "lr_schedule_kwargs": module.lr_schedule_kwargs,
        "warmup_ratio": module.warmup_ratio,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "precision": precision_of(trainer),
        "dtype": str(network.base.dtype),
        "dtype of the adapters": _adapters_dtype(network) if module.lora is not None else None,
        "averaging": averaging_in_words(trainer),
    }


def _adapters_dtype(network: Any) -> str:
    return str(next(parameter.dtype for name, parameter in network.named_parameters() if of_adapter(name)))


def facts_of(module: "FineTuner") -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {
        "identity": identity(module),
        "settings": settings_of(module),
        "optimizer": type(module.trainer.optimizers[0]).__qualname__,
        "optimizer_module": type(module.trainer.optimizers[0]).__module__,
        "data_seed": getattr(getattr(module.trainer, "datamodule", None), "seed", None),
        "reference": module.reference_weights,
        "skipped": module.step.skipped.state(),
        "micro_batches": module.trainer.accumulate_grad_batches,
        "saved_at": time.time(),
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, each as "before → now"."""
    pairs = {what: (then.get(what), value) for what, value in now.items()}
    return {what: f"{_short(old)} → {_short(new)}" for what, (old, new) in pairs.items() if old != new}


def refuse(then: Mapping[str, Mapping[str, Any]], now: Identity, allowed: Iterable[str] = ()) -> None:
    """Raise a `UserError` that names all differences of kinds that are not `allowed`."""
    found = {kind: changes(then.get(kind, {}), parts) for kind, parts in now.items() if kind not in allowed}
    found = {kind: differences for kind, differences in found.items() if differences}
    if not found:
        return
    listed = "; ".join(
        f"{kind} ({part}): {change}" if part else f"{kind}: {change}"
        for kind, differences in found.items()
        for part, change in differences.items()
    )
    if {"lora", "optimizer", "parameters", "shapes"} & found.keys():
        way = "its state does not fit these options: give the same ones"
    else:
        way = f"go on all the same with --allow_changes '[{', '.join(sorted({*found, *allowed}))}]'"
    raise UserError(
        f"the checkpoint is of a run with other options ({listed}): choose another --run_dir, start anew with "
        f"--overwrite true, or a new run from its exported model; {way}"
    )


def refuse_optimizer(then: Mapping[str, Any], optimizer: Any) -> None:
    """Refuse an optimizer of another class than the checkpoint's facts name, of another package with the same name."""
    kind = type(optimizer)
    refuse({"optimizer": {"": then["optimizer"]}}, {"optimizer": {"": kind.__qualname__}})
    module = then.get("optimizer_module", kind.__module__)  # not there in checkpoints of earlier versions
    refuse({"optimizer": {"module": module}}, {"optimizer": {"module": kind.__module__}})


def shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of each tensor, for `refuse`."""
    return {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}


def rescale_progress(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Let Lightning's counters of micro-batches fit another number of them in each step."""
    before = checkpoint[CHECKPOINT_KEY]["micro_batches"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        short = counts["ready"] - counts["completed"]  # 1 where it was saved at the end of a micro-batch
        ready = counts["ready"] // before * micro_batches  # what had been begun of a step is begun anew
        counts.update(ready=ready, started=ready, processed=ready, completed=ready - short)


def age(seconds: float) -> str:
    """A time span in words."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _place(name: str | None) -> str | None:
    """One name for a folder, however it is reached."""
    return os.path.realpath(name) if name is not None and os.path.exists(name) else name


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        given = ", ".join(f"{key}={_short(inner)}" for key, inner in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({given})"
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
