from __future__ import annotations

import pytest

from instar.errors import UserError
from instar.planning.hardware import ACCELERATORS, NETWORK, find


@pytest.mark.parametrize(
    ("text", "nodes", "devices"),
    [("H100", 1, 1), ("8xH100", 1, 8), ("2x8xh100", 2, 8), ("4090", 1, 1), ("4x4090", 1, 4)],
)
def test_names_say_how_many(text: str, nodes: int, devices: int) -> None:
    found = find(text)
    assert (found.nodes, found.devices) == (nodes, devices)
    assert found.world_size == nodes * devices


@pytest.mark.parametrize("text", ["", "x", "8x", "0xH100", "H100x8", "TPU", "8x8x8xH100"])
def test_what_nobody_knows_is_an_error(text: str) -> None:
    with pytest.raises(UserError, match="no hardware"):
        find(text)


def test_several_nodes_speak_over_the_network() -> None:
    one = ACCELERATORS["H100"]
    assert find("8xH100").slowest_link == one.link
    assert find("2x8xH100").slowest_link == NETWORK < one.link
