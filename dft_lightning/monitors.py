"""The names of metrics that callbacks monitor: one that nothing logs is refused before the training."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from dft_lightning.errors import UserError
from dft_lightning.metrics import mean_names
from dft_lightning.suggestions import did_you_mean

if TYPE_CHECKING:
    from dft_lightning.module import FineTuner

#: Of a step, next to the means over its tokens.
_OF_STEPS = ("lr", "grad_norm", "skipped_steps", "router_loss")
#: Prefixes of names that depend on other options, or come from Lightning's own callbacks.
_OTHERS = ("throughput/", "lr")


def logged() -> list[str]:
    """Names of what a fit logs of its steps and validations."""
    means = mean_names()
    train = [name for name in means if name != "top1"]
    return [f"train/{name}" for name in (*train, *_OF_STEPS)] + [f"val/{name}" for name in (*means, "router_loss")]


def check_monitors(module: "FineTuner", data: Any) -> None:
    """Refuse monitors that nothing logs.

    Other names are let pass where a callback or a module of the user's own may log them.

    Raises:
        UserError: names the callback and its monitor, and what is logged; or there is no validation.
    """
    callbacks: list[Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
    known = logged()
    own = not all(type(each).__module__.startswith(("lightning.", "dft_lightning.")) for each in [module, *callbacks])
    validates = getattr(data, "val_rows", None) is not None and module.trainer.limit_val_batches != 0
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor.startswith(_OTHERS):
            continue
        where = f"the callback {type(callback).__name__.lstrip('_')} monitors {monitor!r}"
        if monitor not in known and not own:
            raise UserError(
                f"{where}, which is not logged: a fit logs {', '.join(known)}{did_you_mean(monitor, known)}"
            )
        default = hasattr(callback, "save_best") and monitor == module.weighting.monitor[0]
        if monitor in known and monitor.startswith("val/") and not (validates or default):
            raise UserError(f"{where}, but nothing is validated: set data.val_size or data.val_path")
