"""What is tried on the model itself before it is trained, so that nothing is computed wrongly or advised in vain."""

from typing import Any

import torch
from torch import nn

from dft_lightning.attention_choice import check_boundaries, passing
from dft_lightning.decoder import decoder_of
from dft_lightning.lora_targets import check_used
from dft_lightning.recomputation import Recomputation, changes_products, refuse_selective


class ModelChecks(nn.Module):
    """The part of `WeightedLM` that tries its model; on a sharded model, all ranks have to call the same."""

    model: Any
    has_adapter: Any
    base: Any

    @property
    def decoder(self) -> Any:
        """What turns token ids into last hidden states."""
        return decoder_of(self.base)

    @property
    def vocabulary(self) -> int:
        """Ids that the output head knows."""
        return int(self.base.get_output_embeddings().weight.shape[0])

    @property
    def adapted(self) -> str:
        """What has an adapter, and what has none, in words."""
        return str(getattr(self.model, "lora_targets", ""))

    def check_borders(self) -> None:
        """Prove that packed sequences do not see each other; a `UserError` where they do."""
        check_boundaries(self.base, self.vocabulary)

    def check_adapters(self) -> None:
        """Check that each adapter takes part in a training pass on this device; a `UserError` where one does not."""
        if self.has_adapter:
            check_used(self, self.base.device, self.vocabulary)

    def check_recomputation(self, kind: Recomputation) -> None:
        """Check that gradients are right with this activation checkpointing; a `UserError` where they are not."""
        if kind == "selective":
            ids = torch.arange(8, device=self.base.device)[None] % self.vocabulary
            with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
                changed = changes_products(lambda: self.decoder(input_ids=ids, use_cache=False))
            refuse_selective(self.decoder, changed)

    def packs_with(self) -> list[str]:
        """The attention implementations other than the present one that keep packed sequences of this model apart."""
        return passing(self.base, self.vocabulary, packed=True)
