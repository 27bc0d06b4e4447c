"""Every weighting in a real run: its statistics arrive, and how a step is cut up changes nothing."""

import pytest
import torch
from harness import fit
from test_published import PUBLISHED

from dft_lightning.weighting import ProFit

#: One of each class; the old policy that PSFT compares with is tested where it is kept.
EACH = {type(row[0]): row[0] for row in PUBLISHED if "old_logp" not in row[0].needs}
EACH[ProFit] = ProFit(0.8, "lower")  # an untrained model gives no token a p of 0.1


@pytest.mark.parametrize("weighting", EACH.values(), ids=repr)
def test_one_gradient_from_micro_batches_of_any_size(model_dir, rows_file, weighting):
    """Bound: 1e-5, as in exactness.py: √10⁴ roundings of 6e-8 in float32."""
    runs = [fit(model_dir, rows_file, weighting, data={"micro_batch_size": size}, max_steps=2)[1] for size in (8, 3)]
    whole, parts = (run.gradients for run in runs)
    assert len(whole) == len(parts) == 2
    for one, other in zip(whole, parts, strict=True):
        assert torch.isfinite(one).all()
        assert one.norm() > 0
        assert (one - other).norm() <= 1e-5 * one.norm()
