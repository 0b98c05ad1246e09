"""Every tensor function's declared shapes are checked while the tests run."""

import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(
    ["instar.model.layers", "instar.objectives", "instar.rollout.advantages"],
    "beartype.beartype",
)
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def measured_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of a busy machine is no answer for the user's runs."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
