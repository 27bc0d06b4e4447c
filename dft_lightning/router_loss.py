"""The load-balancing loss of a mixture of experts' routers, computed from the routing of the full optimizer step.

    L = E · Σ_e f_e · P_e      f_e = Σ 1[expert e is among the k of its token] / n,      P_e = Σ p_e / n

where the sums go over the n = tokens × routers of the step, p is the softmax of a router's logits, and f has no
gradient. William Fedus, Barret Zoph, Noam Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with
Simple and Efficient Sparsity", arXiv 2101.03961, equations 4 to 6, for k = 1 and one layer. As in transformers, k may
be larger, so that f sums to k, and all layers are pooled before f and P are multiplied; padding is not counted.

f and n belong to the full step and are constants, so that the loss is a sum over its micro-batches: each adds
E · Σ_e f_e · (its own Σ p_e) / n. It does not depend on how the step is divided into micro-batches and ranks.

Shapes: E experts, L routers, B rows of T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.normalizer import at_least_something

if TYPE_CHECKING:
    from dft_lightning.data.batch import Batch


@dataclass(frozen=True)
class Routing:
    """Sums over the tokens and routers of some micro-batches.

    Args:
        chosen: (E,) how often each expert is among the k of a token, float64, without gradient.
        probability: (E,) of the routers' probabilities, float64.
        count: () tokens × routers, float64.
    """

    chosen: Tensor
    probability: Tensor
    count: Tensor

    @property
    def balance(self) -> Tensor:
        """The loss L, (), if these are all tokens of the step; see the module's docstring."""
        return share_of_balance(self, self.chosen, self.count)


def share_of_balance(routing: Routing, chosen: Tensor, count: Tensor) -> Tensor:
    """What some micro-batches add to the loss L of their step, ().

    Args:
        chosen: (E,) of the full step.
        count: () of the full step.
    """
    count = at_least_something(count)
    return len(chosen) * (chosen / count * (routing.probability / count)).sum()


def routing_of(logits: Sequence[Tensor], real: Tensor, top_k: int, *, dtype: torch.dtype | None = None) -> Routing:
    """The routing of a micro-batch.

    Args:
        logits: of each router, (B·T, E).
        real: (B·T,) bool, whether a position holds a token; the others are padding.
        top_k: experts that each token is sent to.
        dtype: of the softmax; by default at least float32.
    """
    experts = logits[0].shape[-1]
    chosen = torch.zeros(experts, dtype=torch.float64, device=real.device)
    probability, marks = chosen, real.double().repeat_interleave(top_k)
    for layer in logits:
        flat = layer.reshape(-1, experts)
        wide = dtype or torch.promote_types(flat.dtype, torch.float32)
        each = flat.softmax(dim=-1, dtype=wide)  # (B·T, E)
        chosen = chosen.index_add(0, each.detach().topk(top_k).indices.flatten(), marks)
        probability = probability + torch.where(real[:, None], each, 0.0).sum(dim=0, dtype=torch.float64)
    return Routing(chosen, probability, real.sum(dtype=torch.float64) * len(logits))


def real_positions(batch: "Batch") -> Tensor:
    """Which positions of a batch hold tokens, (B·T,) bool."""
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    filled = torch.tensor(batch.filled).to(device, non_blocking=True)  # (B,)
    return (torch.arange(width, device=device) < filled[:, None]).flatten()


def recording(decoder: Any, wanted: bool = False) -> dict[str, bool]:
    """What a decoder is to be told so that it returns its routers' logits, or not, whatever its configuration says."""
    by_default = bool(getattr(decoder.config, "output_router_logits", False))
    return {} if by_default == wanted else {"output_router_logits": wanted}


class RouterLoss:
    """The router loss of a run: what is recorded in forward passes, and what each micro-batch adds to its step.

    Args:
        coefficient: by which L is multiplied.
        top_k: experts that each token is sent to.
    """

    def __init__(self, coefficient: float, top_k: int) -> None:
        self.coefficient, self.top_k = coefficient, top_k
        self._recorded: Routing | None = None
        self._validated: Tensor | None = None

    def record(self, logits: Sequence[Tensor] | None, batch: "Batch") -> None:
        """Keep the routing of the batch that is in the forward pass; see `take`."""
        real = real_positions(batch)
        if not logits or any(layer.numel() != len(real) * logits[0].shape[-1] for layer in logits):
            raise UserError("the model's routers did not return logits for each token: set --model.router_loss none")
        self._recorded = routing_of(logits, real, self.top_k)

    def peek(self) -> Routing:
        """The routing of the batch that was last in a forward pass with this recorder."""
        assert self._recorded is not None, "no forward pass had this recorder"
        return self._recorded

    def take(self) -> Routing:
        """The same, and forget it, and with it the graph that it holds."""
        recorded, self._recorded = self.peek(), None
        return recorded

    def share(self, totals: "StepTotals") -> tuple[Tensor, Tensor]:
        """What the recorded micro-batch adds to the sum that is its loss, (), and to L, () without gradient.

        The step's gradient is divided by its units at the end: they are in the first of the two.
        """
        value = share_of_balance(self.take(), totals.chosen, totals.count)
        return self.coefficient * totals.units * value, value.detach()

    def validate(self) -> None:
        """Add the recorded batch to the validation set's sums."""
        routing = self.take()
        sums = torch.cat([routing.chosen, routing.probability, routing.count[None]])
        self._validated = sums if self._validated is None else self._validated + sums

    def validated(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """L of the validation set, as if it were one step, by the name that it is logged by; then start again."""
        if self._validated is None:
            return {}
        sums, self._validated = reduce(self._validated), None
        chosen, probability = sums[:-1].chunk(2)
        return {"router_loss": Routing(chosen, probability, sums[-1]).balance}


@dataclass(frozen=True)
class StepTotals:
    """What the router loss has to know of a full optimizer step, all ranks included.

    Args:
        chosen: (E,) as in `Routing`.
        count: () as in `Routing`.
        units: () by what the step's gradient is divided, float64.
    """

    chosen: Tensor
    count: Tensor
    units: Tensor


def step_totals(
    routings: Sequence[Routing], units: Sequence[int | Tensor], reduce: Callable[[Tensor], Tensor]
) -> StepTotals:
    """The totals of a step.

    Args:
        routings: of this rank's micro-batches.
        units: what each of them adds to the divisor; see `normalizer.units`.
        reduce: sums a tensor over the ranks.
    """
    device = routings[0].chosen.device
    numbers = [torch.as_tensor(each, dtype=torch.float64).to(device, non_blocking=True) for each in units]
    count = torch.stack([routing.count for routing in routings]).sum()
    chosen = torch.stack([routing.chosen for routing in routings]).sum(dim=0)
    summed = reduce(torch.cat([chosen, torch.stack([count, torch.stack(numbers).sum()])]))
    return StepTotals(summed[:-2], summed[-2], summed[-1])
