"""From hidden states and the output head to log-probabilities, statistics and the weighted loss."""

from dft_lightning.logprob.chunked import weighted_nll
from dft_lightning.logprob.dense import dense_weighted_nll
from dft_lightning.logprob.head import LogitTransform
from dft_lightning.logprob.targets import ReferenceHead

__all__ = ["LogitTransform", "ReferenceHead", "dense_weighted_nll", "weighted_nll"]
