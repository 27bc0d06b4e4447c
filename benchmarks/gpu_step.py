"""Optimizer steps of models as large as are fine-tuned, with random weights: tokens/s, MFU and memory of one device.

    python benchmarks/gpu_step.py [--shape qwen2.5-1.5b --rows 4 --accumulate 4 --compile --profile …]
    python benchmarks/gpu_step.py --shape tiny --width 256 --rows 2 --steps 3      (anywhere: to try it out)

A step is what a run does: packed rows with documents of all lengths, the weighted loss, gradients over micro-batches,
normalising, clipping, fused AdamW (states in the weights' precision, bfloat16). All but the data loader is in the time.
MFU counts what the model needs by definition, see `Throughput`; the peak is the maker's, see dft_lightning/planning.
"""

import argparse
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from dft_lightning import varlen
from dft_lightning import weighting as weightings
from dft_lightning.compilation import compile_layers, rehearse
from dft_lightning.data.batch import Batch, Collator
from dft_lightning.data.packing import best_fit_decreasing
from dft_lightning.models import WeightedLM
from dft_lightning.planning.flops import model_flops
from dft_lightning.planning.peaks import find_device
from dft_lightning.recomputation import recompute

#: family, hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head
SHAPES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "tiny": ("Qwen2", 64, 160, 2, 4, 2, 1000, True),
    "smollm2-135m": ("Llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b": ("Qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("Qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": ("Qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b": ("Llama", 4096, 14336, 32, 32, 8, 128256, False),
}


def build(options: argparse.Namespace) -> WeightedLM:
    """The model with random weights, on the device."""
    import transformers

    family, hidden, inner, layers, heads, groups, vocabulary, tied = SHAPES[options.shape]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=max(options.width, 4096),
    )  # fmt: skip
    varlen.register()
    made: Any = transformers.AutoModelForCausalLM
    with torch.device(options.device):
        model = made.from_config(config, dtype=torch.bfloat16, attn_implementation=options.attention)
    network = WeightedLM(model.train())
    recompute(model.get_decoder(), options.recompute)
    return network


def batches(options: argparse.Namespace, vocabulary: int) -> list[Batch]:
    """Micro-batches of full rows: documents of log-normal lengths, of which three quarters are supervised."""
    random = np.random.default_rng(0)
    rows = options.rows * options.accumulate
    lengths = np.clip(random.lognormal(np.log(options.document), 0.7, 4 * rows * options.width // options.document), 8,
                      options.width).astype(int)  # fmt: skip
    lengths = np.sort(lengths)[::-1]
    packed = sorted(best_fit_decreasing(lengths, options.width), key=lambda row: -lengths[row].sum())[:rows]
    collate = Collator(packed=True, width=options.width, fixed=(options.rows, options.rows * max(map(len, packed)) + 1))

    def document(length: int) -> dict[str, Any]:
        ids = random.integers(vocabulary, size=length)
        return {"row": 0, "input_ids": ids, "supervised": np.arange(length) >= length // 4}

    laid = [[document(int(lengths[number])) for number in row] for row in packed]
    cut = [laid[start : start + options.rows] for start in range(0, rows, options.rows)]
    return [collate(part).to(options.device) for part in cut]


def step(network: WeightedLM, optimizer: torch.optim.Optimizer, micro: list[Batch], options: argparse.Namespace) -> Any:
    """One optimizer step; its loss, on the device."""
    weighting = getattr(weightings, options.weighting)()
    total = torch.zeros((), device=options.device)
    for batch in micro:
        loss, _ = network(batch, weighting, logits=torch.bfloat16 if options.logits == "bfloat16" else None)
        loss.backward()
        total += loss.detach()
    parameters = list(network.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, float(sum(len(batch.target) for batch in micro)))
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def profile(run: Any, device: str) -> None:
    """Where the time of one step goes."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=kinds) as found:
        run()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens and FLOPs per second, MFU and peak memory of the steps after the warm-up."""
    network = build(options)
    micro = batches(options, SHAPES[options.shape][6])
    if options.compile:
        compile_layers(network.base.get_decoder())
        rehearse(network, micro[0], nullcontext())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    wait = torch.cuda.synchronize if options.device == "cuda" else (lambda: None)
    for _ in range(options.warmup):
        loss = step(network, optimizer, micro, options)
    wait()
    began = time.perf_counter()
    for _ in range(options.steps):
        loss = step(network, optimizer, micro, options)
    wait()
    seconds = (time.perf_counter() - began) / options.steps
    if options.profile:
        profile(lambda: (step(network, optimizer, micro, options), wait()), options.device)
    return results(network, micro, seconds, float(loss), options.device)


def results(network: WeightedLM, micro: list[Batch], seconds: float, loss: float, device: str) -> dict[str, Any]:
    """By name; None for what is not known of the device."""
    flops = model_flops(network)
    needed = sum(flops.of(batch.lengths, len(batch.target)) for batch in micro)
    tokens = sum(batch.tokens for batch in micro)
    found = {"loss": loss, "tokens_per_s": tokens / seconds, "flops_per_s": needed / seconds}
    if device != "cuda":
        return found | {"device": "cpu", "mfu": None, "bytes": None}
    name = torch.cuda.get_device_name()
    known = find_device(name)
    peak = None if known is None else known.peak("bfloat16")
    mfu = None if peak is None else needed / seconds / peak
    return found | {"device": name, "mfu": mfu, "bytes": torch.cuda.max_memory_allocated()}


def parser() -> argparse.ArgumentParser:
    """Of the options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    found.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--width", type=int, default=4096, help="tokens of a packed row")
    found.add_argument("--document", type=int, default=500, help="median tokens of a document")
    found.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    found.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    found.add_argument("--steps", type=int, default=8)
    found.add_argument("--warmup", type=int, default=2)
    found.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    found.add_argument("--compile", action="store_true")
    found.add_argument("--attention", default="varlen")
    found.add_argument("--weighting", default="DFT")
    found.add_argument("--logits", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--profile", action="store_true")
    return found


def main() -> None:
    options = parser().parse_args()
    report(measured(options), options)


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    """One line of the table."""
    print(f"{found['device']}, torch {torch.__version__}; loss {found['loss']:.1f}\n")
    print("| shape | rows × width | recomputed | compiled | tokens/s | FLOP/s | MFU | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    shape = f"{options.rows} × {options.width}, {options.accumulate} a step"
    cells = (options.shape, shape, options.recompute, options.compile, f"{found['tokens_per_s']:,.0f}")
    mfu = "–" if found["mfu"] is None else f"{found['mfu']:.1%}"
    memory = "–" if found["bytes"] is None else f"{found['bytes'] / 2**30:.1f} GiB"
    print(f"| {' | '.join(map(str, cells))} | {found['flops_per_s']:.3g} | {mfu} | {memory} |")


if __name__ == "__main__":
    main()
