"""Every weighting against the loss it was published as: that loss is written down here, and differentiated in float64.

Shapes: B sequences, T positions, N supervised tokens, V words.
"""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dft_lightning.logprob import dense_weighted_nll, weighted_nll
from dft_lightning.step_weights import weigh_together
from dft_lightning.weighting import (
    CADFT,
    CHORD,
    DEFT,
    DFT,
    EAFT,
    LUFFY,
    PSFT,
    SRFT,
    TALR,
    Cayley,
    Focal,
    ImportanceWeighted,
    InfoSFT,
    MixCE,
    Power,
    ProFit,
    Rho1,
    SentenceDFT,
    Thresholded,
    Uniform,
)
from dft_lightning.weighting.catalogue import entries

B, T, V = 5, 7, 37
SUPERVISED = [[3, 4, 5], [1, 2, 3, 4, 5, 6], [6], [0, 2, 3, 5], [2, 3, 4, 5, 6]]


def batch() -> SimpleNamespace:
    """Random logits of padded rows; of two tokens p is about 1e-30, of one exactly 1, and of some the mask is 0."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, labels = 2 * normal(B, T, V), torch.randint(0, V, (B, T), generator=generator)
    mask = torch.zeros(B, T, dtype=torch.bool)
    for row, places in enumerate(SUPERVISED):
        mask[row, places] = True
    for row, place, wanted in [(0, 3, -69.0), (3, 2, -69.5), (1, 4, 80.0), (4, 5, 4.0), (4, 6, 6.0)]:
        rest = logits[row, place].index_fill(0, labels[row, place], -torch.inf).logsumexp(0)
        logits[row, place, labels[row, place]] = rest + wanted
    logp = logits.log_softmax(2).gather(2, labels[..., None])[..., 0]
    return SimpleNamespace(
        logits=logits, labels=labels, mask=mask, ref=logp + 0.6 * normal(B, T), old=logp + 0.3 * normal(B, T)
    )


def facts(given: SimpleNamespace, logits: Tensor) -> SimpleNamespace:
    """What a published loss is written in, (B, T) each; a masked position has label -100 in a trainer, 0 here."""
    full = logits.log_softmax(2)
    logp = full.gather(2, given.labels.where(given.mask, 0)[..., None])[..., 0]
    with torch.no_grad():
        probabilities = full.exp()
        top = logits.topk(20, dim=2).values.softmax(2)
        entropy, top_entropy = -(probabilities * full).sum(2), -(top * top.log()).sum(2)
    return SimpleNamespace(
        logp=logp, p=logp.exp(), rest=-torch.expm1(logp), mask=given.mask, ref=given.ref, old=given.old,
        entropy=entropy, top_entropy=top_entropy, collision=probabilities.square().sum(2),
    )  # fmt: skip


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the positions that count; a masked one may hold anything."""
    return x[mask].mean()


def by_sequence(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over each sequence's supervised positions (B, 1)."""
    return x.where(mask, 0).sum(1, keepdim=True)


def sft(weight: Tensor, of: SimpleNamespace) -> Tensor:
    """A loss that was published as a detached weight on the negative log-likelihood."""
    return mean(-weight.detach() * of.logp, of.mask)


def kept(selected: Tensor, loss: Tensor, of: SimpleNamespace) -> Tensor:
    """The mean over what is selected."""
    return mean(loss, of.mask & selected)


def responses(of: SimpleNamespace) -> Tensor:
    """Mean −log p of each sequence (B, 1)."""
    return -(by_sequence(of.logp, of.mask) / of.mask.sum(1, keepdim=True)).detach()


def importance(of: SimpleNamespace, level: str) -> Tensor:
    ratio = of.logp - of.ref
    if level == "token":
        return ratio.exp().clamp(0.2, 1.8)
    return (by_sequence(ratio, of.mask) / of.mask.sum(1, keepdim=True)).exp().clamp(0, 16).expand(B, T)


def talr(of: SimpleNamespace) -> Tensor:
    tau = statistics.median(responses(of).flatten().tolist())
    return sft(of.p.pow(1 / tau).clamp(min=0.01), of)


def infosft(of: SimpleNamespace) -> Tensor:
    logit = of.logp - of.rest.abs().log()
    weight = (of.p * (math.log(0.93 / 0.07) - logit).clamp(min=0)).detach()
    return sft(weight / mean(weight, of.mask), of)


def cayley(of: SimpleNamespace) -> Tensor:
    lowest = 0.5 * mean(of.p, of.mask)
    a = (lowest + (1 - lowest) * of.p / (2 - of.p)).clamp(0.001, 1).detach()
    return mean((1 - of.p**a) / a, of.mask)


def psft(of: SimpleNamespace) -> Tensor:
    ratio = (of.logp - of.old).exp()
    return mean(-torch.minimum(ratio, ratio.clamp(0.8, 1.28)), of.mask)


def rho1(of: SimpleNamespace, percent: int) -> Tensor:
    excess = (of.ref - of.logp).detach()
    count = -(-int(of.mask.sum()) * percent // 100)
    border = sorted(excess[of.mask].tolist())[-count]
    return kept(excess >= border, -of.logp, of)


def cadft(of: SimpleNamespace) -> Tensor:
    each = responses(of).flatten().tolist()
    z = (responses(of) - statistics.mean(each)) / statistics.stdev(each)
    return mean((1 - of.p) * torch.exp(-0.7 * z.clamp(min=0)), of.mask)


def sentence(of: SimpleNamespace, lengths: Tensor) -> Tensor:
    """T·(1 − (Πp)^(1/T)), summed over sequences; T = 1 for the product."""
    total = by_sequence(of.logp, of.mask)
    return (lengths * (1 - (total / lengths).exp())).sum() / of.mask.sum()


PUBLISHED = [
    (Uniform(), lambda of: mean(-of.logp, of.mask)),
    (DFT(), lambda of: mean(1 - of.p, of.mask)),
    (DFT(0.1), lambda of: mean(torch.where(of.p > 0.1, 0.1 - of.p, -0.1 * of.logp), of.mask)),
    (MixCE(0.3), lambda of: mean(-0.3 * of.logp - 0.7 * of.p, of.mask)),
    (Power(8.0), lambda of: mean((1 - of.p**8) / 8, of.mask)),
    (Power(0.5), lambda of: mean((1 - of.p.sqrt()) / 0.5, of.mask)),
    (Thresholded(0.1), lambda of: kept(of.p >= 0.1, 1 - of.p, of)),
    (Thresholded(0.2, keep="bottom"), lambda of: kept(of.p <= 0.2, 1 - of.p, of)),
    (Thresholded(0.1, "logp"), lambda of: kept(of.p >= 0.1, -of.logp, of)),
    (Thresholded(0.2, "logp", "bottom"), lambda of: kept(of.p <= 0.2, -of.logp, of)),
    (ProFit(), lambda of: mean(torch.where(of.p >= 0.1, -of.logp, 0), of.mask)),
    (ProFit(0.8, "lower"), lambda of: mean(torch.where(of.p <= 0.8, -of.logp, 0), of.mask)),
    (ProFit(0.1, "middle", 0.9), lambda of: mean(torch.where((of.p - 0.5).abs() <= 0.4, -of.logp, 0), of.mask)),
    (CHORD(), lambda of: sft(of.p * of.rest, of)),
    (LUFFY(), lambda of: mean(-of.p / (of.p + 0.1), of.mask)),
    (LUFFY(0.7), lambda of: mean(-of.p / (of.p + 0.7), of.mask)),
    (Focal(), lambda of: mean(-(of.rest**2) * of.logp, of.mask)),
    (Focal(1.5), lambda of: mean(-of.rest.pow(1.5) * of.logp, of.mask)),
    (Focal(0.5, detached=True), lambda of: sft(of.rest.sqrt(), of)),
    (TALR(), talr),
    (InfoSFT(), infosft),
    (Cayley(), cayley),
    (EAFT(), lambda of: sft(of.top_entropy / 3.0, of)),
    (EAFT(0.5, 1.0), lambda of: sft(of.top_entropy.sqrt(), of)),
    (DEFT(), lambda of: mean((1 - of.p**of.collision) / (of.collision + 1e-6), of.mask)),
    (SRFT(), lambda of: sft(0.5 * torch.exp(-by_sequence(of.entropy, of.mask) / of.mask.sum(1, keepdim=True)), of)),
    (ImportanceWeighted(), lambda of: sft(importance(of, "sequence"), of)),
    (ImportanceWeighted("token"), lambda of: sft(importance(of, "token"), of)),
    (PSFT(), psft),
    (Rho1(), lambda of: rho1(of, 60)),
    (Rho1(25.0), lambda of: rho1(of, 25)),
    (CADFT(0.7), cadft),
    (SentenceDFT(), lambda of: sentence(of, of.mask.sum(1, keepdim=True))),
    (SentenceDFT("product"), lambda of: sentence(of, torch.ones(B, 1))),
]
ROWS = pytest.mark.parametrize(("weighting", "published"), PUBLISHED, ids=[repr(row[0]) for row in PUBLISHED])


def arguments(given: SimpleNamespace) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The supervised tokens as the loss takes them; the head is the identity, so hidden states are logits."""
    sequence = torch.arange(B)[:, None].expand(B, T)[given.mask]
    brought = {"sequence": sequence, "ref_logp": given.ref[given.mask], "old_logp": given.old[given.mask]}
    brought["position"] = torch.cat([torch.arange(len(places)) for places in SUPERVISED])
    hidden = given.logits[given.mask].clone().requires_grad_()
    return [hidden, torch.eye(V, dtype=torch.float64), given.labels[given.mask]], brought


def normalised(loss: Tensor, tokens, weighting) -> Tensor:
    """The step's loss: its sum, divided as the weighting declares."""
    weight = tokens.weight
    divided_by = {"tokens": len(tokens), "weights": weight.sum(), "selected": (weight != 0).sum()}
    return loss / divided_by[weighting.divisor]


def published_gradient(given: SimpleNamespace, published) -> tuple[Tensor, Tensor]:
    """−∂L/∂log p and ∂L/∂logits of the supervised tokens, (N,) and (N, V)."""
    logits = given.logits.clone().requires_grad_()
    of = facts(given, logits)
    leaf = of.logp.detach().requires_grad_()
    parts = vars(of) | {"logp": leaf, "p": leaf.exp(), "rest": -torch.expm1(leaf)}
    by_logp = torch.autograd.grad(published(SimpleNamespace(**parts)), leaf)[0]
    by_logits = torch.autograd.grad(published(of), logits)[0]
    assert not by_logits[~given.mask].any()
    return -by_logp[given.mask], by_logits[given.mask]


def ours(function, given: SimpleNamespace, weighting, **options) -> tuple[Tensor, object, Tensor]:
    """Normalised loss, tokens, and its gradient by the logits (N, V)."""
    (hidden, head, targets), brought = arguments(given)
    if weighting.scope == "step" and function is weighted_nll:
        _, seen = weighted_nll(hidden, head, targets, Uniform(), wanted=weighting.needs, **brought)
        options["weight"] = torch.cat(weigh_together(weighting, [seen[:4], seen[4:]]))
    loss, tokens = function(hidden, head, targets, weighting, **brought, **options)
    loss = normalised(loss, tokens, weighting)
    return loss.detach(), tokens, torch.autograd.grad(loss, hidden)[0]


@ROWS
def test_the_gradient_is_that_of_the_published_loss(weighting, published):
    """Both ways of the loss and any chunk size; rounding of float64 (1e-16) over 37 terms stays below 1e-12."""
    given = batch()
    weight, gradient = published_gradient(given, published)
    runs = [ours(weighted_nll, given, weighting, chunk_rows=rows) for rows in (1, 5, 1000)]
    for loss, tokens, by_logits in [*runs, ours(dense_weighted_nll, given, weighting)]:
        divided = normalised(tokens.weight, tokens, weighting)
        torch.testing.assert_close(divided, weight, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(by_logits, gradient, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(loss, -(weight * tokens.logp).sum(), rtol=1e-9, atol=1e-13)


@ROWS
def test_packed_is_the_same_as_alone(weighting, published):
    """A sequence's tokens weigh the same beside others as by themselves, unless the whole step is looked at."""
    (hidden, head, targets), brought = arguments(batch())
    if weighting.scope == "step":
        _, seen = weighted_nll(hidden, head, targets, Uniform(), wanted=weighting.needs, **brought)
        one = weigh_together(weighting, [seen])[0]
        turned = weigh_together(weighting, [seen[torch.arange(len(seen)).flip(0)]])[0].flip(0)
        torch.testing.assert_close(turned, one, rtol=0, atol=0)
        return
    _, together = weighted_nll(hidden, head, targets, weighting, **brought)
    for row in range(B):
        own = brought["sequence"] == row
        part = {name: value[own] for name, value in brought.items()}
        _, alone = weighted_nll(hidden[own], head, targets[own], weighting, **part)
        torch.testing.assert_close(alone.weight, together.weight[own], rtol=1e-12, atol=0)


def test_every_weighting_has_its_published_loss_here():
    elsewhere = {"Targets over the vocabulary", "Modifiers of another weighting"}
    assert {type(row[0]) for row in PUBLISHED} == {entry.cls for entry in entries() if entry.group not in elsewhere}
