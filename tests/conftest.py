"""Every tensor function's declared shapes are checked while the tests run."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(
    [
        "instar.model.layers",
        "instar.model.experts",
        "instar.model.feedforward",
        "instar.model.gpt2",
        "instar.model.rotary",
        "instar.objectives",
        "instar.rollout.advantages",
    ],
    "beartype.beartype",
)
torch.set_num_threads(1)
# How long an example takes says more about the machine than about the code.
settings.register_profile("instar", deadline=None)
settings.load_profile("instar")


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
