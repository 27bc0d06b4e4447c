"""The tables of docs/scaling.md: what sharded training needs on 1 to 1,024 H200s, by arithmetic.

    python benchmarks/scaling_on_paper.py [--write]

Nothing is timed, no weight is loaded and no GPU is touched. With --write the tables in the document are renewed, each
between its two marks; without, they are printed.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dft_lightning.models import WeightedLM
from dft_lightning.planning.flops import ModelFlops, model_flops
from dft_lightning.planning.memory import GIB
from dft_lightning.planning.peaks import find_device
from dft_lightning.planning.rehearsal import MicroBatch, Setting, skeleton
from dft_lightning.planning.scaling import (
    MASTERS,
    PURE,
    Memory,
    Mesh,
    Precision,
    Weights,
    activations,
    memory,
    weights_of,
)
from dft_lightning.planning.traffic import (
    H200,
    StepTime,
    context_parallel,
    moved,
    step_time,
    tensor_parallel,
    tokens_to_hide,
)

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
#: hidden size, width of the feed-forward layer, layers, heads, heads of keys, vocabulary, tied head: the published
#: config.json of Qwen2.5-Math-1.5B and -7B, Qwen2.5-32B and Llama-3.1-8B, -70B and -405B.
MODELS: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "1.5B": ("Qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "7B": ("Qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "8B": ("Llama", 4096, 14336, 32, 32, 8, 128256, False),
    "32B": ("Qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    "70B": ("Llama", 8192, 28672, 80, 64, 8, 128256, False),
    "405B": ("Llama", 16384, 53248, 126, 128, 8, 128256, False),
}
DEVICES = (1, 8, 64, 256, 1024)
LENGTH, SEQUENCES = 2048, 256  # the DFT paper's rows, and its sequences an optimizer step
UTILISATION = 0.4
MICRO = (8, 4, 2, 1)


@dataclass(frozen=True)
class Subject:
    """A model, as far as its shapes go."""

    name: str
    config: Any
    weights: Weights
    flops: ModelFlops

    def seconds(self, sequences: float) -> float:
        """That a device computes for so many full sequences."""
        device = find_device("H200")
        assert device is not None
        return sequences * self.flops.of([LENGTH], LENGTH - 1) / (device.half * 1e12 * UTILISATION)


@cache
def subject(name: str) -> Subject:
    """A model of the table."""
    import transformers

    family, hidden, inner, layers, heads, keys, vocabulary, tied = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=LENGTH,
    )
    network = WeightedLM(skeleton(config, None, torch.bfloat16, "bf16-true", "sdpa"))
    return Subject(name, config, weights_of(config), model_flops(network))


@cache
def held_by_a_micro_batch(name: str, sequences: int) -> int:
    """Bytes of a micro-batch of full sequences whose layers are computed again in the backward pass."""
    rows = 2 * GIB // (4 * MODELS[name][6]) // 128 * 128
    setting = Setting(torch.bfloat16, "bf16-true", "varlen", "full", cuda=True, chunk_rows=rows, accumulates=True)
    return activations(subject(name).config, MicroBatch.full(sequences, LENGTH), setting)


def need(name: str, shards: int, precision: Precision, sequences: int = 1) -> Memory:
    """What a device holds."""
    return memory(subject(name).weights, Mesh(shards), precision, held_by_a_micro_batch(name, sequences))


def fits(name: str, shards: int, precision: Precision, sequences: int = 1) -> bool:
    """Whether that is no more than an H200 has."""
    device = find_device("H200")
    assert device is not None
    return need(name, shards, precision, sequences).total <= device.gib * GIB


def largest(name: str, shards: int, at_most: float) -> int | None:
    """Sequences of the largest micro-batch that fits; None if not even one does."""
    return next((count for count in MICRO if count <= max(at_most, 1) and fits(name, shards, MASTERS, count)), None)


def smallest_group(name: str, devices: int) -> int | None:
    """The fewest devices, whole nodes of them beyond one, that one copy of the states fits on."""
    return next(
        (shards for shards in (8, 16, 32, 64, 128, 256) if shards <= devices and largest(name, shards, 1)), None
    )


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def memory_table(precision: Precision) -> str:
    """GiB a device, by models and devices of one copy of the states; in bold what an H200 has room for."""

    def row(name: str) -> Iterator[str]:
        yield f"{name}: {subject(name).weights.total / 1e9:,.2f}"
        yield f"{held_by_a_micro_batch(name, 1) / GIB:,.1f}"
        for devices in DEVICES:
            total = f"{need(name, devices, precision).total / GIB:,.1f}"
            yield f"**{total}**" if fits(name, devices, precision) else total

    head = ["model: numbers, 10⁹", "activations", *(f"{devices:,}" for devices in DEVICES)]
    return table(head, (list(row(name)) for name in MODELS))


def traffic_table() -> str:
    """GB that come to a device in one micro-batch, by NVLink / by its adapter."""

    def row(name: str) -> Iterator[str]:
        yield name
        for devices in DEVICES[1:]:
            come = moved(subject(name).weights, Mesh(devices), MASTERS)
            yield f"{come.near / 1e9:,.1f} / {come.far / 1e9:,.1f}"
        group = smallest_group(name, 1024)
        come = moved(subject(name).weights, Mesh(group or 1024, 1024 // (group or 1024)), MASTERS)
        yield f"{group}: {come.near / 1e9:,.1f} / {come.far / 1e9:,.1f}"

    head = ["model", *(f"{devices:,}" for devices in DEVICES[1:]), "1,024 in groups of"]
    return table(head, (list(row(name)) for name in MODELS))


def timed(name: str, mesh: Mesh, sequences: float) -> StepTime | None:
    """A step of so many sequences a device; None where no micro-batch fits."""
    micro = largest(name, mesh.shards, sequences)
    if micro is None:
        return None
    there = subject(name)
    return step_time(there.weights, mesh, MASTERS, H200, there.seconds(sequences), round(sequences / micro))


def said(found: StepTime | None) -> str:
    """Seconds, and the share of them in which the device computes."""
    return "–" if found is None else f"{found.total:,.3g} s, {found.efficiency:.0%}"


def time_table(sequences: Callable[[int], float], devices: tuple[int, ...]) -> str:
    """Seconds of a step and share of computing: all devices one group, and in the smallest groups that fit."""

    def row(name: str, hybrid: bool) -> Iterator[str]:
        yield f"{name}, hybrid" if hybrid else name
        for count in devices:
            shards = smallest_group(name, count) if hybrid else count
            if shards is None or (hybrid and shards == count):
                yield "–"
                continue
            mark = f" ({shards})" if hybrid else ""
            yield said(timed(name, Mesh(shards, count // shards), sequences(count))) + mark

    rows = (list(row(name, hybrid)) for name in MODELS for hybrid in (False, True))
    return table(["model", *(f"{count:,}" for count in devices)], (r for r in rows if set(r[1:]) != {"–"}))


def hiding_table() -> str:
    """Tokens a device and micro-batch from which on the layers' collectives are hidden."""

    def row(name: str) -> Iterator[str]:
        there = subject(name)
        a_token = there.seconds(1) / LENGTH
        yield name
        for shards in DEVICES[1:]:
            yield f"{tokens_to_hide(there.weights, Mesh(shards), MASTERS, H200, a_token):,.0f}"

    return table(["model", *(f"{count:,}" for count in DEVICES[1:])], (list(row(name)) for name in MODELS))


def split_table() -> str:
    """Seconds of computing one sequence over eight devices, and of moving what splitting it takes."""

    def row(name: str) -> list[str]:
        _, hidden, _, layers, heads, keys, _, _ = MODELS[name]
        tensor = H200.seconds(tensor_parallel(LENGTH, hidden, layers, 8))
        context = H200.seconds(context_parallel(LENGTH, keys * hidden // heads, layers, 8, 1))
        return [name, *(f"{1000 * value:,.1f}" for value in (subject(name).seconds(1 / 8), tensor, context))]

    head = ["model", "computing, ms", "layers split: moving, ms", "sequence split: moving, ms"]
    return table(head, (row(name) for name in MODELS))


TABLES: dict[str, Callable[[], str]] = {
    "memory, float32 masters": lambda: memory_table(MASTERS),
    "memory, bfloat16": lambda: memory_table(PURE),
    "traffic": traffic_table,
    "time, the paper's step": lambda: time_table(lambda devices: SEQUENCES / devices, DEVICES[:-1]),
    "time, eight sequences a device": lambda: time_table(lambda _: 8.0, DEVICES),
    "tokens that hide": hiding_table,
    "splitting a sequence": split_table,
}


def renewed(document: str) -> str:
    """The document with its tables made anew."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(document)) != 1:
            raise SystemExit(f"expected the marks {begin} and {end} once, one after the other")
        text = f"{begin}\n{made()}\n{end}"
        document = pattern.sub(lambda _, text=text: text, document)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the tables of docs/scaling.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
        return
    for name, made in TABLES.items():
        print(f"{name}\n\n{made()}\n", flush=True)


if __name__ == "__main__":
    main()
