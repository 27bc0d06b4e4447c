"""What a model of transformers itself returns as its loss for a few tokens, next to what its logits say.

The difference shows every term that the model adds to the cross entropy in training, known by name or not.

Shapes: T positions, V vocabulary, E experts.
"""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dft_lightning.decoder import decoder_of
from dft_lightning.router_loss import Routing, recording, routing_of

_TOKENS = 8
#: Operations behind a loss that each round a number of the size of the largest logit, log V or the loss: subtraction of
#: the maximum, exponential, sum, logarithm, gather, mean, further terms; 32 of them are generous.
_ROUNDINGS = 32


@dataclass(frozen=True)
class OwnLoss:
    """A model's own loss.

    Args:
        loss: as the model returns it; NaN where it does not.
        nll: mean negative log-likelihoods by the logits that it returns: with labels shifted, and as they are given.
        rounding: by how much they may differ because of rounding alone.
        balance: the router loss that it returns without its coefficient, where it does.
        router_logits: of each router, (T, E), where it returns them.
        skipped: why nothing could be compared, or "".
    """

    loss: float = math.nan
    nll: tuple[float, float] = (math.nan, math.nan)
    rounding: float = math.nan
    balance: float | None = None
    router_logits: tuple[Tensor, ...] = field(default=())
    skipped: str = ""

    def unknown(self, known: float = 0.0, rounding: float = 0.0) -> float:
        """The loss without cross entropy and a known term; 0 where it is within rounding.

        Args:
            known: the term.
            rounding: of the term.
        """
        shifted, as_given = (self.loss - nll - known for nll in self.nll)
        # some classes leave the shift of labels to their caller
        return 0.0 if min(abs(shifted), abs(as_given)) <= self.rounding + rounding else shifted

    def routing(self, top_k: int) -> Routing:
        """The routing of the tokens, in the precision in which transformers has it."""
        first = self.router_logits[0]
        real = torch.ones(first.numel() // first.shape[-1], dtype=torch.bool, device=first.device)
        return routing_of(self.router_logits, real, top_k, dtype=first.dtype)


@torch.no_grad()
def own_loss(base: Any, router_logits: bool) -> OwnLoss:
    """Probe a model in training mode; neither it nor the state of the random number generators changes.

    Args:
        base: a `PreTrainedModel`.
        router_logits: whether the model is to return its routers' logits.
    """
    device = base.device
    vocabulary = base.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    given = {"input_ids": ids, "labels": ids, "use_cache": False} | recording(decoder_of(base), router_logits)
    if "labels" not in inspect.signature(base.forward).parameters:
        return OwnLoss(skipped="its forward takes no labels")
    modes = {module: module.training for module in base.modules()}
    base.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            output = base(**given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # families share no class of error
        return OwnLoss(skipped=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        for module, mode in modes.items():
            module.training = mode
    if output.loss is None:
        return OwnLoss(skipped="it returns no loss")
    return _read(output, ids[0])


def _read(output: Any, ids: Tensor) -> OwnLoss:
    logits: Tensor = output.logits[0].double()  # (T, V)
    each = -logits.log_softmax(dim=1)
    shifted, as_given = each[:-1].gather(1, ids[1:, None]), each.gather(1, ids[:, None])
    loss, largest = float(output.loss), float(logits.abs().max())
    eps = torch.finfo(output.loss.dtype).eps
    balance = getattr(output, "aux_loss", None)
    return OwnLoss(
        loss=loss,
        nll=(float(shifted.mean()), float(as_given.mean())),
        rounding=_ROUNDINGS * eps * (largest + math.log(logits.shape[1]) + abs(loss)),
        balance=None if balance is None else float(balance),
        router_logits=tuple(getattr(output, "router_logits", None) or ()),
    )
