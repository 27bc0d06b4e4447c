"""The commands in-process, and what they should find: by the model's own full logits in float64."""

import json
from dataclasses import dataclass

import numpy as np
import torch

from dft_lightning import NuminaMathDataModule
from dft_lightning.__main__ import main
from dft_lightning.loading import ModelSource, load_model, load_tokenizer
from dft_lightning.weighting import TokenStats


def options(model, rows, **data):
    usual = {"max_length": 60, "global_batch_size": 8, "micro_batch_size": 3} | data
    given = ["--model.model_name", str(model), "--data", "NuminaMathDataModule", "--data.path", str(rows)]
    return given + [str(part) for name, value in usual.items() for part in (f"--data.{name}", value)]


def diagnose(tmp_path, model, rows, *args, **data):
    """The JSON that a diagnosis wrote."""
    page = tmp_path / "out" / "diagnosis.html"
    status = main(["diagnose", *options(model, rows, **data), "--output", str(page), *map(str, args)])
    assert status == 0
    return json.loads(page.with_suffix(".json").read_text())


def train_rows(model, rows, **data):
    """The rows that a command reads by the same options."""
    module = NuminaMathDataModule(str(rows), **({"max_length": 60} | data))
    module.tokenizer = load_tokenizer(ModelSource(str(model)))
    module.setup("predict")
    return module


@dataclass
class Truth:
    """Token by token, in the order of the rows."""

    model: torch.nn.Module
    logits: torch.Tensor  # (N, V) with a graph
    tokens: TokenStats
    sources: list[str]

    def loss(self, weights) -> torch.Tensor:
        logp = self.logits.log_softmax(1).gather(1, self.tokens.target[:, None])[:, 0]
        return -(weights * logp).sum()

    def pull(self, weights) -> torch.Tensor:
        """The norm of the loss's gradient by each token's logits, by autograd."""
        (gradient,) = torch.autograd.grad(self.loss(weights), self.logits, retain_graph=True)
        return gradient.norm(dim=1)

    def gradient(self, loss) -> torch.Tensor:
        parameters = list(self.model.parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, found, strict=True)
            ]
        )


def truth(model_dir, rows) -> Truth:
    model = load_model(ModelSource(str(model_dir), torch.float64)).eval()
    parts, targets, sequence, position, sources = [], [], [], [], []
    for number in range(len(rows)):
        row = rows[number]
        ids = torch.from_numpy(row["input_ids"])
        before = np.flatnonzero(row["supervised"][1:])
        parts.append(model(input_ids=ids[None]).logits[0][before])
        targets.append(ids[before + 1])
        sequence += [number] * len(before)
        position += range(len(before))
        sources += [row["source"]] * len(before)
    logits, target = torch.cat(parts), torch.cat(targets)
    logp = logits.detach().log_softmax(1)
    tokens = TokenStats(
        logp=logp.gather(1, target[:, None])[:, 0],
        target=target,
        sequence=torch.tensor(sequence),
        position=torch.tensor(position),
        entropy=-(logp.exp() * logp).sum(1),
        collision=logp.exp().square().sum(1),
    )
    return Truth(model, logits, tokens, sources)


def shares(mass, group, count):
    """Per group, of the sum."""
    return (torch.bincount(group, weights=mass, minlength=count) / mass.sum()).tolist()
