"""Packed against padded rows: tokens/s of forward and backward over the same sequences, in one run.

    python benchmarks/packing.py --path ROWS.parquet [--sequences 64 --max_length 2048 --rounds 2]

Every layout has the same sequences and gives the same gradient (make exactness); padding does not count as tokens.
"plain" is a padded batch of rows in order of the shuffle, "length" of rows of similar length. The ratio is to "length".
"""

import argparse
import time
from typing import Any

import torch

from dft_lightning.data import NuminaMathDataModule
from dft_lightning.loading import ModelSource, load_model, load_tokenizer
from dft_lightning.models import WeightedLM
from dft_lightning.weighting import DFT

LAYOUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("padded, plain", "sdpa", {"grouping": "plain", "micro_batch_size": 4}),
    ("padded, length", "sdpa", {"micro_batch_size": 4}),
    ("packed", "sdpa", {"packing": True, "micro_batch_size": 1}),
    ("packed", "varlen", {"packing": True, "micro_batch_size": 1}),
    ("padding-free", "varlen", {"packing": "padding_free", "micro_batch_size": 1}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    options = parser.parse_args()
    model = load_model(ModelSource(options.model_name, torch.bfloat16))
    network, seconds, shares, tokens = WeightedLM(model), [0.0] * len(LAYOUTS), [0.0] * len(LAYOUTS), 0
    for round_number in range(options.rounds):
        for number, (_, attention, layout) in enumerate(LAYOUTS):
            data = NuminaMathDataModule(
                options.path, global_batch_size=options.sequences, max_length=options.max_length, **layout
            )
            data.tokenizer = load_tokenizer(ModelSource(options.model_name))
            data.prepare_data()
            data.setup("fit")
            batches = data.step(0, round_number)
            model.set_attn_implementation(attention)
            network(batches[-1], DFT())[0].backward()  # warm
            began = time.perf_counter()
            for batch in batches:
                network(batch, DFT())[0].backward()
            seconds[number] += time.perf_counter() - began
            positions = sum(batch.input_ids.numel() for batch in batches if len(batch))
            shares[number] += sum(batch.tokens for batch in batches) / positions / options.rounds
        tokens += sum(batch.tokens for batch in batches)
    print("| layout | attention | positions used | tokens/s | ratio |\n|---|---|---|---|---|")
    for (name, attention, _), used, spent in zip(LAYOUTS, shares, seconds, strict=True):
        print(f"| {name} | {attention} | {used:.1%} | {tokens / spent:.0f} | {seconds[1] / spent:.2f} |", flush=True)


if __name__ == "__main__":
    main()
