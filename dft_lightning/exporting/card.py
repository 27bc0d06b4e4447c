"""The model card of an exported model: what made it what it is, in the form the hub reads."""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import yaml

#: Options of data modules that name files or folders.
_PLACES = ("path", "val_path", "test_path", "cache_dir", "dataset")
_PACKAGES = ("dft-lightning", "lightning", "torch", "transformers", "peft", "bitsandbytes")
#: By whether the adapter is merged.
_QUANTIZED = {
    False: "in 4 bits: its logits are those of training beside `BitsAndBytesConfig(load_in_4bit=True, "
    'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)` only',
    True: "in 4 bits (nf4); these weights are what those stand for, and the adapter's product",
}

_ENLARGED = (
    "trained in full and part of this folder; before the adapter is loaded, call `resize_token_embeddings` of the base "
    "model with as many rows as `embed_tokens` has in `adapter_model.safetensors`"
)


def card(
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    step: int,
    metrics: Mapping[str, float],
    run_dir: Path,
    merged: bool = False,
) -> str:
    """README.md of a model.

    Args:
        options: those of the run's `FineTuner`.
        facts: see `resume.facts_of`.
        metrics: the last that was logged at this step or before.
        run_dir: holds config.yaml, from which the data are known.
        merged: whether an adapter is part of the weights.
    """
    weighting, base = said(options["weighting"]), without_folders(options["model_name"])
    objective = {"Weighting": f"`{weighting}`", "Normalised by": options["normalize"], "Base model": f"`{base}`"}
    if options.get("adapter") is not None:
        before = {"continue": "an adapter that was trained further", "merge": "an adapter, merged before the training"}
        objective["Base model"] = f"`{base}`, {before[options['adapter']]}"
    if options["lora"] is not None:
        given = ", ".join(f"{key} {value}" for key, value in options["lora"].items() if value is not None)
        objective["LoRA"] = f"{given}; {'merged into the weights' if merged else 'this folder is the adapter'}"
    if options.get("resize_embeddings") and options["lora"] is not None and not merged:
        objective["Embedding and head"] = _ENLARGED
    if options.get("quantization") is not None:
        objective["Base as it was trained"] = _QUANTIZED[merged]
    objective["Optimizer steps"] = f"{step:,} of {facts['settings']['steps']:,}"
    objective |= {key: value for key, value in facts["settings"].items() if key != "steps" and value is not None}
    shown = {name: f"{value:.6g}" for name, value in sorted(metrics.items())} or {"none": "was logged beside it"}
    parts = [
        _front(options, weighting, adapter=options["lora"] is not None and not merged),
        f"# {Path(base).name}, fine-tuned by {weighting}",
        "Each token's log-likelihood was weighted: loss = −Σ sg(w)·log π(y), with w as below.",
        _table(objective),
        "## Data",
        _data(run_dir),
        _table(facts["identity"]["data"]),
        f"## Metrics at step {step:,}",
        _table(shown),
        "## Versions",
        _table(_versions()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def said(spec: Any) -> str:
    """A weighting's specification as one would call it in Python."""
    if isinstance(spec, Mapping) and "class_path" in spec:
        given = ", ".join(f"{key}={said(value)}" for key, value in spec.get("init_args", {}).items())
        return f"{spec['class_path'].rpartition('.')[2]}({given})"
    return repr(spec)


def logged_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The last value of each metric that TensorBoard's events have up to a step: `val/…`, and `train/nll`."""
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    if not (run_dir / "tensorboard").is_dir():
        return {}
    kept = {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1}
    events = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), kept)
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        if is_metric(tag) and (upto := [event.value for event in events.Scalars(tag) if event.step <= step]):
            found[tag] = float(upto[-1])
    return found


def is_metric(name: str) -> bool:
    """Whether a logged value belongs on the card."""
    return name.startswith("val/") or name == "train/nll"


def _front(options: Mapping[str, Any], weighting: str, adapter: bool) -> str:
    tags = ["dft-lightning", weighting.partition("(")[0]]
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    name = options["model_name"]
    if not os.path.exists(name) and without_folders(name) == name:  # a folder says nothing to others
        head["base_model"] = name
    return f"---\n{yaml.safe_dump(head | {'tags': tags}, sort_keys=False)}---"


def _data(run_dir: Path) -> str:
    """The `data` of the run's configuration, without what it leaves open."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())["data"]
        given = {key: value for key, value in (config.get("init_args") or {}).items() if value is not None}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ""
    shown = {key: _without_folders_within(value) for key, value in {**config, "init_args": given}.items()}
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"


def without_folders(name: Any) -> str:
    """A name as it is, but of an absolute path, which says nothing to others, its last part alone."""
    text = str(name)
    for path in (PurePath(os.path.expanduser(text)), PureWindowsPath(text)):
        if path.is_absolute():
            return path.name
    return text


def _without_folders_within(value: Any, key: str = "") -> Any:
    """The same within options of the data: those that name a place, and whatever else is a path of this machine."""
    if isinstance(value, Mapping):
        return {name: _without_folders_within(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders_within(inner, key) for inner in value]
    if isinstance(value, str) and (key in _PLACES or (os.path.isabs(value) and os.path.exists(value))):
        return without_folders(value)
    return value


def _table(rows: Mapping[str, Any]) -> str:
    cells = {name: str(value).replace("|", "\\|").replace("\n", " ") for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells.items())])


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # peft is optional
            continue
    return found
