"""Weightings with targets over the vocabulary, before any training: what tokens are worth, and how they pull.

Shapes: N supervised tokens of a batch, b of a block, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dft_lightning.logprob.rows import slices
from dft_lightning.logprob.targets import target_gradient
from dft_lightning.models import WeightedLM
from dft_lightning.weighting import TokenStats, TokenWeighting
from dft_lightning.weighting.base import REF_DISTRIBUTION, checked_targets, checked_weights

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch

#: Tokens whose distributions are held at a time.
_BLOCK = 64


@torch.no_grad()
def worth_and_pull(
    network: WeightedLM, batch: "Batch", weighting: TokenWeighting, tokens: TokenStats
) -> tuple[Tensor, Tensor]:
    """All that the given word is worth, and the norm of the gradient by the logits, (N,) each.

    The model is its own reference: nothing has been trained yet.

    Args:
        tokens: the batch's, with all that the weighting needs.
    """
    own = network.reference(batch, adapter=True)
    weight = checked_weights(weighting, tokens)
    worth, pull = torch.empty_like(weight), torch.empty_like(weight)
    for rows in slices(len(tokens), _BLOCK):
        z = own.transform.forward_((own.hidden[rows] @ own.weight.T.to(own.hidden.dtype)).to(weight.dtype))
        logp, target = z.log_softmax(1), tokens.target[rows, None]
        q = checked_targets(weighting, tokens[rows], logp, logp if REF_DISTRIBUTION in weighting.needs else None)
        worth[rows] = weight[rows] + q.gather(1, target)[:, 0]
        pull[rows] = target_gradient(logp.exp(), q, weight[rows], tokens.logp[rows], target).norm(dim=1)
    return worth, pull
