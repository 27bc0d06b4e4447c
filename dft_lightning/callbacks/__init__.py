"""What happens around the training steps."""

from dft_lightning.callbacks.checkpoints import Checkpoints
from dft_lightning.callbacks.environment import Environment
from dft_lightning.callbacks.export import Export
from dft_lightning.callbacks.preemption import Preemption
from dft_lightning.callbacks.progress import Progress
from dft_lightning.callbacks.roll_call import RollCall
from dft_lightning.callbacks.run_summary import RunSummary
from dft_lightning.callbacks.throughput import Throughput
from dft_lightning.callbacks.token_probabilities import TokenProbabilities
from dft_lightning.callbacks.token_scores import TokenScores

__all__ = [
    "Checkpoints",
    "Environment",
    "Export",
    "Preemption",
    "Progress",
    "RollCall",
    "RunSummary",
    "Throughput",
    "TokenProbabilities",
    "TokenScores",
]
