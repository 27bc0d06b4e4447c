"""The proof that backbone, head and what the family does to its logits are all there is between them.

Shapes: T positions, H hidden size, V vocabulary.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dft_lightning.router_loss import recording

if TYPE_CHECKING:
    from dft_lightning.models import WeightedLM


@torch.no_grad()
def splits(network: "WeightedLM", head: nn.Linear) -> bool:
    """Whether backbone, head and transform give the model's own logits on eight tokens.

    Both sides round alike but for the order of sums, so 32 units of rounding of the largest logit are generous.
    """
    training = network.training
    network.eval()
    ids = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    given = {"input_ids": ids, "use_cache": False} | recording(network.base.get_decoder())
    own = network.model(**given).logits[0].to(wide)
    states = network.base.get_decoder()(**given).last_hidden_state[0]
    ours = network._transform_of(head).forward_((states @ head.weight.to(states.dtype).T).to(wide))
    network.train(training)
    return bool((own - ours).abs().max() <= 32 * torch.finfo(states.dtype).eps * own.abs().max().clamp(min=1e-3))
