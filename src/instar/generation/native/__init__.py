"""``forward.cpp``: built once on a machine, and called with a model's weights.

Where there is no C++ compiler with OpenMP, ``lean.forward`` does the same with torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from instar.generation.lean import Body, Place
from instar.generation.products import Format, in_eight_bits
from instar.machine import cache_directory
from instar.model.config import ModelConfig

HERE = Path(__file__).parent
SOURCE = HERE / "forward.cpp"
# Nobody reads errno or catches arithmetic signals; a quotient may be a reciprocal times a number.
ARITHMETIC = ["-fno-math-errno", "-fno-trapping-math", "-freciprocal-math"]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", *ARITHMETIC]

log = logging.getLogger(__name__)

Int, Float, Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


# The records of the source, by their names there.


class Matrix(ctypes.Structure):
    """A matrix in panels."""

    _fields_ = [
        *((name, Pointer) for name in ("panels", "scales", "bias")),
        *((name, Int) for name in ("inputs", "outputs")),
    ]


class Layer(ctypes.Structure):
    """The matrices of a block."""

    _fields_ = [
        *((name, Matrix) for name in ("into_heads", "out_of_heads", "widen", "narrow")),
        ("head_norm", Pointer),
    ]


class Model(ctypes.Structure):
    """All matrices, and the model's shape."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("head", Matrix),
        *((name, Pointer) for name in ("cos", "sin")),
        *((name, Int) for name in ("depth", "hidden", "inner", "heads", "kv_heads", "width")),
        *((name, Float) for name in ("eps", "head_eps")),
    ]


class Store(ctypes.Structure):
    """Keys and values of all rows."""

    _fields_ = [("start", Pointer), ("rows", Int), ("columns", Int)]


ARGUMENTS = [
    *(ctypes.POINTER(Model), ctypes.POINTER(Store)),
    *(Int, Pointer, Pointer, Pointer),  # tokens: how many, rows, places, residual stream
    *(Pointer, Int, Pointer),  # those whose logits are asked for, how many, the logits
    ctypes.c_int,  # threads
]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled source, built if this machine has not done so yet; none without a compiler."""
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]
    if not shutil.which(command[0]):
        log.info("there is no C++ compiler (%s): writing takes longer", command[0])
        return None
    try:
        built = ctypes.CDLL(str(_built(command)))
    except (subprocess.CalledProcessError, OSError) as error:
        told = getattr(error, "stderr", None) or str(error)
        log.warning("%s cannot build %s: writing takes longer\n%s", command[0], SOURCE.name, told)
        return None
    for name in get_args(Format):
        forward = getattr(built, f"forward_{name}")
        forward.argtypes, forward.restype = ARGUMENTS, None
    return built


def _built(command: list[str]) -> Path:
    """The library's path; its name tells the source, the flags, and the processor."""
    # What the compiler defines is what it knows of the processor, and its own version.
    known = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_bytes() for path in sorted(HERE.glob("*.[ch]*"))]
    content = hashlib.sha256(b"".join([*sources, f"{command}{known}".encode()])).hexdigest()
    path = cache_directory() / f"forward-{content[:16]}.so"
    if not path.exists():
        log.info("building %s, once on this machine", SOURCE.name)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            _run([*command, "-shared", "-fPIC", "-o", str(made), str(SOURCE)])
            made.replace(path)  # whole or not at all, whoever else builds it now
    return path


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def takes(config: ModelConfig, device: torch.device) -> bool:
    """Whether a model can be written with here."""
    widths = config.hidden_size, config.intermediate_size, config.head_dim
    even = all(width % 2 == 0 for width in widths)
    return device.type == "cpu" and even and library() is not None


def cache_dtype(format: Format) -> torch.dtype:
    """Of keys and values."""
    return torch.float32 if format == "float32" else torch.bfloat16


class Panels:
    """A matrix in the order in which the source reads it.

    Panels of so many outputs; in each, words of one float32 or two smaller inputs: the first of
    every output, then the second...

    Args:
        format: What is kept; in eight bits, ``products.in_eight_bits``.
        weight: ``(outputs, inputs)``, float32.
        bias: Added, if there is one.
    """

    def __init__(self, format: Format, weight: Tensor, bias: Tensor | None) -> None:
        self.shape = weight.shape[::-1]
        self.scales: Tensor | None = None
        built = library()
        assert built is not None
        panel, word = built.panel_width(), torch.int32
        if format == "int8":
            weight, self.scales = in_eight_bits(weight)
            if built.whole_in_word() == 2:
                word = torch.int16
            else:  # multiplied as numbers from 0 to 255
                weight = F.pad(weight, (0, -weight.shape[1] % 4)).view(torch.uint8) ^ 128
        else:
            weight = weight.to(getattr(torch, format))
        padded = F.pad(weight, (0, 0, 0, -len(weight) % panel)).contiguous()
        words = padded.view(word)
        self.panels = words.view(-1, panel, words.shape[1]).transpose(1, 2).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def record(self) -> Matrix:
        """What the source is told of it; it has to outlive that."""
        starts = [_start(tensor) for tensor in (self.panels, self.scales, self.bias)]
        return Matrix(*starts, *self.shape)


class NativeForward:
    """``lean.forward`` in compiled code.

    Args:
        body: The weights.
        format: Of the matrices.
    """

    def __init__(self, body: Body[Panels], format: Format) -> None:
        self.body = body  # keeps alive what the records below point to
        built, c = library(), body.config
        assert built is not None
        self._dtype = cache_dtype(format)
        self._forward = getattr(built, f"forward_{format}")
        self._tables = [t.contiguous() for t in (body.cos, body.sin)]
        layers = [
            Layer(*(matrix.record() for matrix in layer[:4]), _start(layer.head_norm))
            for layer in body.layers
        ]
        self._model = Model(
            (Layer * len(layers))(*layers),
            body.head.record(),
            *(_start(table) for table in self._tables),
            len(layers),
            c.hidden_size,
            c.intermediate_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            body.eps.item(),
            body.head_eps.item(),
        )

    def __call__(self, ids: Tensor, place: Place, last: Tensor | None) -> Tensor:
        """As ``lean.forward``; nothing is computed for padding."""
        rows, places = place.numbers, place.lengths
        if last is None:
            ids, ends = ids[:, 0], torch.arange(len(ids))
        else:
            counts = last + 1
            real = torch.arange(ids.shape[1]) < counts[:, None]
            places = (places[:, None] + torch.arange(ids.shape[1]))[real]
            ids, rows, ends = ids[real], rows.repeat_interleave(counts), counts.cumsum(0) - 1
        x = F.embedding(ids, self.body.embedding).float()
        logits = torch.empty(len(ends), self.body.head.shape[1])
        assert place.store.dtype == self._dtype and place.store.is_contiguous()
        store = Store(_start(place.store), place.store.shape[2], place.store.shape[4])
        rows, places = rows.contiguous(), places.contiguous()
        self._forward(
            ctypes.byref(self._model),
            ctypes.byref(store),
            len(ids),
            *(_start(tensor) for tensor in (rows, places, x, ends)),
            len(ends),
            _start(logits),
            torch.get_num_threads(),
        )
        return logits


def _start(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
