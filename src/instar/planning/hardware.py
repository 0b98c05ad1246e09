"""The machines that a recipe may run on: this one, measured, and accelerators by their sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from instar.errors import UserError
from instar.machine import memory_bytes, product_flops
from instar.training.precision import resolve

GB, TB, TERA = 1e9, 1e12, 1e12


@dataclass(frozen=True)
class Hardware:
    """A machine, or several that work together.

    Attributes:
        name: What it is called.
        flops: Peak of one device's matrix products in bfloat16, dense, operations a second.
        memory_bytes: Of one device.
        bandwidth: Of that memory, bytes a second; 0 where it was not measured.
        link: Between the devices of a node, bytes a second and direction.
        devices: Devices a node.
        nodes: Nodes.
        source: Where the figures come from.
    """

    name: str
    flops: float
    memory_bytes: float
    bandwidth: float
    link: float = 0.0
    devices: int = 1
    nodes: int = 1
    source: str = ""

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.devices * self.nodes

    @property
    def is_cpu(self) -> bool:
        """Whether it is this machine's processor, which can be measured."""
        return self.name == "cpu"

    @property
    def slowest_link(self) -> float:
        """What a ring over all devices moves: the network's share where there are several nodes."""
        return min(self.link, NETWORK) if self.nodes > 1 else self.link


NETWORK = 50 * GB
"""Bytes a second and device between nodes: one 400 Gbit/s adapter a GPU, as NVIDIA's DGX H100
reference design has it. A plainer network is slower, and `instar plan` then too hopeful."""

PCIE4 = 32 * GB

ACCELERATORS = {
    # NVIDIA's data sheets give tensor-core figures with sparsity; dense is half of them.
    "H100": Hardware("H100", 989 * TERA, 80 * GB, 3.35 * TB, 450 * GB, source="NVIDIA H100 SXM"),
    "H200": Hardware("H200", 989 * TERA, 141 * GB, 4.8 * TB, 450 * GB, source="NVIDIA H200 SXM"),
    "B200": Hardware("B200", 2250 * TERA, 180 * GB, 7.7 * TB, 900 * GB, source="NVIDIA DGX B200"),
    "A100": Hardware("A100", 312 * TERA, 80 * GB, 2.0 * TB, 300 * GB, source="NVIDIA A100 SXM"),
    "L40S": Hardware("L40S", 362 * TERA, 48 * GB, 0.864 * TB, PCIE4, source="NVIDIA L40S"),
    "A10": Hardware("A10", 125 * TERA, 24 * GB, 0.6 * TB, PCIE4, source="NVIDIA A10"),
    # GeForce cards accumulate bfloat16 products in float32 at half of their tensor cores' rate.
    "4090": Hardware("4090", 165 * TERA, 24 * GB, 1.008 * TB, PCIE4, source="NVIDIA Ada paper"),
    "3090": Hardware("3090", 71 * TERA, 24 * GB, 0.936 * TB, PCIE4, source="NVIDIA GA102 paper"),
}
"""Peaks from the makers' data sheets: dense bfloat16, bytes and bytes a second a device."""


def this_machine() -> Hardware:
    """The processor that this runs on: its products measured, its memory asked for."""
    device = torch.device("cpu")
    flops = product_flops(resolve("auto", device), device)
    return Hardware("cpu", flops, memory_bytes(device), 0.0, source="measured")


def gpus_here() -> str | None:
    """What this machine's GPUs are called here, or all names where they have none; else nothing."""
    if not torch.cuda.is_available():
        return None
    name, count = torch.cuda.get_device_name().upper(), torch.cuda.device_count()
    for kind in ACCELERATORS:
        if re.search(rf"(?<![A-Z0-9]){kind}(?![0-9])", name):
            return f"{count}x{kind}" if count > 1 else kind
    return "|".join(ACCELERATORS)


def find(text: str) -> Hardware:
    """Hardware by its name: ``cpu``, ``H100``, ``8xH100``, ``2x8xH100`` (nodes, devices, kind).

    Raises:
        UserError: Nobody here knows it.
    """
    if text.lower() == "cpu":
        return this_machine()
    match = re.fullmatch(r"(?:(\d+)x)??(?:(\d+)x)?(?!\d+x)([A-Za-z0-9]+)", text)
    kind = match[3].upper() if match else text
    if not match or kind not in ACCELERATORS or "0" in (match[1], match[2]):
        known = ", ".join(["cpu", *ACCELERATORS])
        raise UserError(
            f"no hardware {text!r} is known",
            f"Known: {known}; several as 8xH100, several nodes as 2x8xH100.",
        )
    one = ACCELERATORS[kind]
    nodes, devices = int(match[1] or 1), int(match[2] or 1)
    return Hardware(**vars(one) | {"name": text, "nodes": nodes, "devices": devices})
