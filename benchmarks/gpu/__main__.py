"""`python benchmarks/gpu`."""

import sys
from pathlib import Path

# as the folder `gpu`, and not with the modules in it as names of their own
sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu.runner import main  # noqa: E402

sys.exit(main())
