"""Every tensor function's declared shapes are checked while the tests run."""

import torch
from jaxtyping import install_import_hook

install_import_hook(
    ["instar.model.layers", "instar.objectives", "instar.rollout.advantages"],
    "beartype.beartype",
)
torch.set_num_threads(1)
