from __future__ import annotations

import sys
from pathlib import Path

# Benchmarks are programs that stand beside the package, not within it.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
