"""LoRA beside a base model in 4 bits (nf4, bitsandbytes): gradients, and a short fit.

The adapters' gradients are compared in float32 with those beside the plain weights that the 4 bits stand for: the very
same products, so the bound is that of sums in another order, 1e-5, relative L2.
"""

from collections.abc import Iterator

from gpu import models
from gpu.bounds import GRADIENT
from gpu.fits import fit
from gpu.fsdp2 import gradients
from gpu.part import Measurement, Setting, SkippedError, attempt
from gpu.precision import judged


def run(setting: Setting) -> Iterator[Measurement]:
    """Where bitsandbytes is."""
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise SkippedError("bitsandbytes is not installed")
    yield from attempt("gradients", same_gradients, setting)
    yield from attempt("a short fit", short_fit, setting)


def same_gradients(setting: Setting) -> Iterator[Measurement]:
    """Of the adapters, beside 4 bits and beside what these stand for."""
    from dft_lightning.loading import ModelSource, load_model
    from dft_lightning.models import LoRA
    from dft_lightning.quantization import read_out

    model = models.save(setting.folder / "model", models.TINY)
    plain = setting.folder / "plain"
    read_out(load_model(ModelSource(str(model), quantization="nf4"))).save_pretrained(plain)
    models.tokenizer().save_pretrained(plain)
    rows = models.save_rows(setting.folder / "rows.jsonl")
    module = {"lora": LoRA(rank=4)}
    truth = gradients(setting, plain, rows, module=module)
    ours = gradients(setting, model, rows, module=module | {"quantization": "nf4"})
    worst = max(float((one - true).norm() / true.norm()) for one, true in zip(ours, truth, strict=True))
    yield Measurement("distance of the adapters' gradients", worst, GRADIENT, note=f"{len(ours)} steps")


def short_fit(setting: Setting) -> Iterator[Measurement]:
    """By the command line."""
    model = models.save(setting.folder / "base", models.TINY)
    options = ["--model.quantization", "nf4", "--model.lora.rank", 8, "--model.optimizer.lr", 0.02]
    options += ["--trainer.precision", "bf16-true"]
    record = fit(setting, model, "qlora", 10, *options)
    yield from judged("bf16-true", record)
    if record["peak"] is not None:
        yield Measurement("peak memory", record["peak"] / 2**20, unit="MiB")
