"""``instar export``: a checkpoint as llama.cpp, Ollama, transformers and people read it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

import instar
from instar.errors import UserError
from instar.files import atomic_directory, is_free, read_json, write_json, write_text
from instar.lineage import LINEAGE

if TYPE_CHECKING:
    from torch import Tensor

    from instar.exchange.gguf_write import Kind
    from instar.training.display import Display

Target = Literal["gguf", "ollama", "safetensors", "card"]

MARK = "export.json"
"""Stands in every directory that is written here, and says how: nobody's own has it."""

OLLAMA_GGUF = "model.gguf"
"""What a Modelfile of ours calls the model beside it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a checkpoint for others.

    gguf is one file for llama.cpp and everything built on it, with our tokenizer and chat
    template. ollama is a directory: that file and a Modelfile. safetensors is a directory for
    transformers and vLLM, without what only training needs. card is a README.md that says what
    the model is, written from its lineage: data, recipe, cost, exams, licence.

    For example:
      instar export runs/mini/rlvr --to gguf --type f32 --out rlvr.gguf
      instar export runs/mini/rlvr --to ollama --out rlvr-ollama
      ollama create rlvr -f rlvr-ollama/Modelfile
      instar export runs/mini/rlvr --to safetensors --type bf16 --out rlvr-hf
      instar export runs/mini/rlvr --to card --license apache-2.0
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint; a card may also be written of an adapter."""
    to: Target
    """What to write."""
    type: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """How to store matrices: f16 where nothing is said; for safetensors as they are stored now."""
    out: Path | None = None
    """File or directory to write; by default beside DIR, and README.md within it."""
    license: str = ""
    """The licence that the card and the GGUF file name; by default that of the base, if known."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar export``.

    Returns:
        The exit status.

    Raises:
        UserError: The checkpoint cannot be written in that way.
    """
    options = tyro.cli(Options, args=argv, prog="instar export")
    if options.to != "card":
        _refuse_adapter(options.directory)

    from instar.training.display import Display

    with Display() as display:
        display.stage("export", options.to)
        display.note(f"wrote {WRITERS[options.to](options, display)}")
    return 0


def _refuse_adapter(directory: Path) -> None:
    """Only whole models are written."""
    if (directory / "config.json").is_file():
        return
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is an adapter, not a model",
            f"Merge it first: instar merge {directory} --out {directory}-merged",
        )
    raise UserError(
        f"{directory} is not a checkpoint: it has no config.json",
        "Name a directory that a stage has written.",
    )


def _beside(directory: Path, ending: str) -> Path:
    """Where to write by default; `.` and `..` have no name of their own."""
    whole = Path(os.path.abspath(directory)) if directory.name in ("", "..") else directory
    return whole.with_name(f"{whole.name}-{ending}")


def _general(directory: Path, license: str) -> dict[str, Any]:
    """What a GGUF file says of itself."""
    from instar.exchange.ancestry import ancestry, general_of

    known = general_of(ancestry(directory))
    general = {"type": "model", "name": known.get("name") or directory.resolve().name}
    if license or known.get("license"):
        general["license"] = license or known["license"]
    if known.get("languages"):
        languages = known["languages"]
        general["languages"] = [languages] if isinstance(languages, str) else languages
    return general


def _gguf(options: Options, display: Display) -> Path:
    from instar.exchange.gguf_write import write_gguf

    kind: Kind = options.type or "f16"
    out = options.out or _beside(options.directory, f"{kind}.gguf")
    general = _general(options.directory, options.license)
    write_gguf(options.directory, out, kind, general, display.step)
    return out


def _ollama(options: Options, display: Display) -> Path:
    from instar.exchange.chat_template import chat_template, recognised
    from instar.exchange.gguf_shape import from_config
    from instar.exchange.gguf_write import write_gguf
    from instar.exchange.ollama import modelfile
    from instar.tokenizer.reading import control_names, read_files

    source = options.directory
    out = options.out or _beside(source, "ollama")
    config, tokenizer = (
        read_json(source / name) for name in ("config.json", "tokenizer_config.json")
    )
    template = chat_template(source, tokenizer)
    tokens = control_names(read_files(source))
    chat = recognised(template, tokens) if template else None
    if chat is None:
        display.note(
            "the chat template is none that instar can write in Ollama's language: Ollama will "
            "look for one that it knows in the GGUF file"
        )
    context = int(from_config(config)[1]["context_length"])
    stops = [tokens["eos_token"]] if "eos_token" in tokens else []
    if chat is not None:
        stops = list(dict.fromkeys(["<|im_end|>", "<|im_start|>", *stops]))
    with _written_anew(out, options) as directory:
        general = _general(source, options.license)
        kind: Kind = options.type or "f16"
        write_gguf(source, directory / OLLAMA_GGUF, kind, general, display.step)
        write_text(directory / "Modelfile", modelfile(OLLAMA_GGUF, chat, stops, context))
    return out


def _safetensors(options: Options, display: Display) -> Path:
    from instar.exchange.card import write_card
    from instar.exchange.importing import CARRIED
    from instar.exchange.weights import DTYPES, StoredWeights, write_weights

    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    if options.type == "q8_0":
        raise UserError("safetensors are not written as q8_0", "Choose f32, f16 or bf16.")
    source = options.directory
    out = options.out or _beside(source, "hf")
    with _written_anew(out, options) as directory, StoredWeights(source) as weights:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for number, name in enumerate(weights, start=1):
                tensor = weights[name]
                yield name, tensor.to(DTYPES[names[options.type]]) if options.type else tensor
                display.step(number, len(weights))

        for name in (*CARRIED, LINEAGE, "exams.json"):
            if (source / name).is_file():
                shutil.copy(source / name, directory)
        write_weights(directory, tensors())
        if options.type:
            config = read_json(source / "config.json")
            config.pop("torch_dtype", None)  # its name before transformers 5
            write_json(directory / "config.json", config | {"dtype": names[options.type]})
        write_card(source, directory / "README.md", options.license)
    return out


@contextmanager
def _written_anew(out: Path, options: Options) -> Iterator[Path]:
    """A directory that becomes ``out``; only what was written here before is replaced.

    Raises:
        UserError: Something of somebody's own is there, or what is to be read.
    """
    if out.resolve() == options.directory.resolve():
        raise UserError(f"{out} is what is to be exported", "Choose another --out.")
    if not is_free(out) and not (out / MARK).is_file():
        raise UserError(
            f"{out} exists and has no {MARK}",
            "Choose another --out, or remove it if an older instar made it.",
        )
    with atomic_directory(out) as directory:
        yield directory
        how = {"to": options.to, "type": options.type, "version": instar.__version__}
        write_json(directory / MARK, {"made_by": "instar export"} | how)


def _card(options: Options, display: Display) -> Path:
    from instar.exchange.card import write_card

    out = options.out or options.directory / "README.md"
    write_card(options.directory, out, options.license)
    return out


WRITERS = {"gguf": _gguf, "ollama": _ollama, "safetensors": _safetensors, "card": _card}
"""What to write to how."""
