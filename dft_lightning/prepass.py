"""The pass without gradient over a full optimizer step, where its gradients depend on all of its micro-batches.

Weightings of step scope need the statistics of all tokens before they can say what one is worth, and the router loss
the routing of all tokens and the step's divisor. The pass has the dropout of the gradient pass.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dft_lightning.errors import UserError
from dft_lightning.normalizer import units
from dft_lightning.router_loss import Routing, StepTotals, step_totals
from dft_lightning.step_weights import unweighted
from dft_lightning.weighting import TokenStats, Uniform

if TYPE_CHECKING:
    from dft_lightning.data import ChatDataModule
    from dft_lightning.data.batch import Batch
    from dft_lightning.module import FineTuner
    from dft_lightning.scoring import WeightedModule


@dataclass
class Prepass:
    """What is known of a step ahead of its gradients.

    Args:
        weights: (N_i,) of the tokens of each of this rank's micro-batches; empty unless the scope is "step".
        totals: what the router loss needs; None where there is none, or where one micro-batch says it all.
    """

    weights: list[Tensor] = field(default_factory=list)
    totals: StepTotals | None = None

    def weight(self, micro_batch: int) -> Tensor | None:
        """Those of one micro-batch."""
        return self.weights[micro_batch] if self.weights else None


def needs_prepass(module: "FineTuner") -> bool:
    """Whether a step has to be passed through before its first gradient."""
    return module.weighting.scope == "step" or (
        module.router is not None and module.trainer.accumulate_grad_batches > 1
    )


def refuse_without_steps(module: "FineTuner", data: Any) -> None:
    """Refuse data that cannot give the micro-batches of a step, where they are needed ahead of it."""
    if hasattr(data, "step"):
        return
    if module.weighting.scope == "step" or module.old_policy is not None:
        raise UserError(
            f"{type(module.weighting).__name__} looks at whole optimizer steps: train with a ChatDataModule"
        )
    if needs_prepass(module):
        raise UserError(
            "a router loss over several micro-batches needs all of them at the start of the step: train with a "
            "ChatDataModule, set trainer.accumulate_grad_batches 1, or --model.router_loss none"
        )


@torch.no_grad()
def prepass(module: "FineTuner", step: int) -> Prepass:
    """Pass through this rank's micro-batches of a step of the epoch, if need be; all ranks have to call this."""
    if not needs_prepass(module):
        return Prepass()
    data, router = cast("ChatDataModule", module.trainer.datamodule), module.router  # type: ignore[attr-defined]
    batches, parts, routings = [], [], list[Routing]()
    for number, batch in enumerate(data.step(module.trainer.current_epoch, step)):
        module._seed(number)
        batches.append(batch)
        parts.append(_passed(module, module._moved(batch)))
        if router is not None:
            routings.append(router.take())
    weights = module._weigh_together(parts) if module.weighting.scope == "step" else []
    if router is None:
        return Prepass(weights)
    known = weights or [part.need("weight") for part in parts]
    counts = [
        units(module.normalize, module._moved(batch), module.weighting.divisor, weight)
        for batch, weight in zip(batches, known, strict=True)
    ]
    return Prepass(weights, step_totals(routings, counts, lambda sums: reduced(module, sums)))


def _passed(module: "FineTuner", batch: "Batch") -> TokenStats:
    """What has to be known of a micro-batch's tokens: their weights only where the step is divided by these."""
    if module.weighting.scope == "step":
        return unweighted(module, batch, router=module.router)
    if module.weighting.divisor != "tokens":
        return module.score(batch, router=module.router)[1]
    tokens: TokenStats = module._network(batch, Uniform(), router=module.router, **module._head_options)[1]
    return tokens


def router_share(
    module: "FineTuner", batch: "Batch", tokens: TokenStats, totals: StepTotals | None
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """What the router loss adds to a micro-batch's loss, and what is logged of it; see `RouterLoss.share`.

    Args:
        totals: as in `Prepass`; a step of one micro-batch on each rank has needed no pass ahead.
    """
    if (router := module.router) is None:
        return 0.0, {}
    if totals is None:
        count = units(module.normalize, batch, module.weighting.divisor, tokens.need("weight"))
        totals = step_totals([router.peek()], [count], lambda sums: reduced(module, sums))
    added, value = router.share(totals)
    return added, {"router_loss": value}


def reduced(module: "WeightedModule", sums: Tensor) -> Tensor:
    """Sums over all ranks."""
    return cast(Tensor, module.trainer.strategy.reduce(sums.detach(), reduce_op="sum"))
