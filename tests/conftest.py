"""Every tensor function's declared shapes are checked while the tests run."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from jaxtyping import install_import_hook

install_import_hook(["instar.model.layers", "instar.objectives", "instar.rollout.advantages"], "beartype.beartype")

import torch

torch.set_num_threads(2)
