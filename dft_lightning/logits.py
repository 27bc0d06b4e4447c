"""The proof that backbone, head and what the family does to its logits are all there is between them.

Shapes: T positions, H hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dft_lightning.logprob import LogitTransform
from dft_lightning.router_loss import recording

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM


@torch.no_grad()
def splits(network: "WeightedLM", head: nn.Linear) -> bool:
    """Whether backbone, head and transform give the model's own logits on eight tokens.

    Both sides round alike but for the order of sums, so 32 units of rounding of the largest logit are generous; some
    models round their logits to float32 whatever the weights are in.
    """
    training = network.training
    network.eval()
    ids = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    given = {"input_ids": ids, "use_cache": False} | recording(network.decoder)
    own = network.model(**given).logits[0]
    states = network.decoder(**given).last_hidden_state[0]
    coarser = max((states.dtype, head.weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    eps = max(torch.finfo(dtype).eps for dtype in (own.dtype, coarser))
    own = own.to(wide)
    ours = network._transform_of(head).forward_((states.to(coarser) @ head.weight.to(coarser).T).to(wide))
    network.train(training)
    return bool((own - ours).abs().max() <= 32 * eps * own.abs().max().clamp(min=1e-3))


#: How RecurrentGemma and xLSTM name their soft-cap. What a name is overlooked for is refused by `splits`.
_OTHER_SOFTCAPS = ("logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> LogitTransform:
    """What the model's family does to its logits, by its configuration (the bias is read from the head itself)."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(text, "lm_head_multiplier", None) or 1.0  # Falcon-H1 multiplies
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite divides
    caps = [getattr(text, name, None) for name in ("final_logit_softcapping", *_OTHER_SOFTCAPS)]
    return LogitTransform(None, float(scale), next((cap for cap in caps if cap), None))
