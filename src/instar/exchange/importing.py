"""``instar import``: any model becomes a checkpoint that stages, exams and chats accept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from instar.errors import UserError
from instar.files import atomic_directory, is_free, read_json, write_json, write_text
from instar.hub import located
from instar.lineage import LINEAGE, Cost, Stopwatch, hash_file, hash_value, peak_rss_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from instar.training.display import Display

Kept = Literal["keep", "float32", "bfloat16", "float16"]

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
CARRIED = ("config.json", "generation_config.json", *TOKENIZER)
"""What is taken over of a Hugging Face directory, beside the weights."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a model into a checkpoint directory that transformers opens and stages train on.

    SOURCE is a GGUF file, a Hugging Face directory, or the id of a model on the hub. Tensors of a
    GGUF file are dequantised, its tokenizer and chat template become Hugging Face's files. The
    directory gets a lineage.json that says what it was made from.

    For example:
      instar import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm
      instar import Qwen/Qwen3-0.6B --out runs/qwen --dtype bfloat16
      instar generate runs/smollm --chat --prompt "What is the capital of France?"
      instar sft recipes/adapt.yaml --init runs/smollm --data talks.jsonl
    """

    source: Annotated[str, tyro.conf.Positional]
    """A .gguf file, a directory that transformers saved, or a hub id such as owner/name."""
    out: Path
    """The directory to write; one that `instar import` wrote before is replaced."""
    dtype: Kept = "keep"
    """How to store the weights. keep: as they come, and dequantised ones as float32."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar import``.

    Returns:
        The exit status.

    Raises:
        UserError: The source cannot be read, or is a model that instar does not have.
    """
    options = tyro.cli(Options, args=argv, prog="instar import")

    from instar.training.display import Display

    with Display() as display:
        import_model(options.source, options.out, options.dtype, display)
    return 0


def import_model(source: str, out: Path, dtype: Kept, display: Display) -> Path:
    """Write the checkpoint directory; see ``Options``.

    Returns:
        ``out``.
    """
    if not is_free(out) and not _imported(out):
        raise UserError(
            f"{out} exists, and `instar import` has not made it", "Choose another --out."
        )
    watch = Stopwatch()
    path = Path(source)
    is_gguf = path.suffix == ".gguf" or (path.is_file() and _begins_as_gguf(path))
    place = path if is_gguf else located(path)
    display.stage("import", "reading")
    with atomic_directory(out) as directory:
        make = _from_gguf if is_gguf else _from_directory
        made = make(place, directory, dtype, display)
        _check(directory)
        _write_lineage(directory, source, dtype, made, watch)
    display.note(f"{out}: {made['parameters']:,} parameters of {made['model']}")
    return out


def _begins_as_gguf(path: Path) -> bool:
    """Whether a file without the usual ending is one all the same; Ollama's have none."""
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _imported(directory: Path) -> bool:
    record = directory / LINEAGE
    return record.is_file() and read_json(record).get("stage") == "import"


def _from_gguf(path: Path, directory: Path, dtype: Kept, display: Display) -> dict[str, Any]:
    """Write a GGUF file's model; returns what the lineage says of it."""
    import torch

    from instar.exchange.gguf_read import GGUFFile
    from instar.exchange.gguf_shape import to_config
    from instar.exchange.tokenizer_in import tokenizer_of
    from instar.exchange.weights import DTYPES, write_weights

    file = GGUFFile(path)
    config = to_config(file.metadata, file.arch, file.vocab_size, file.small)
    length = config.get("max_position_embeddings") or config["n_positions"]
    tokenizer = tokenizer_of(file.metadata, length)
    halves = {"F16": "float16", "BF16": "bfloat16"}
    stored = halves.get(file.matrix_type(), "float32") if dtype == "keep" else dtype
    write_json(directory / "config.json", config | {"dtype": stored} | tokenizer.control)
    write_json(directory / "generation_config.json", tokenizer.control)
    write_json(directory / "tokenizer.json", tokenizer.tokenizer)
    write_json(directory / "tokenizer_config.json", tokenizer.config)
    if tokenizer.template:
        write_text(directory / "chat_template.jinja", tokenizer.template)
    heads = config.get("num_attention_heads") or config["n_head"]
    display.stage("import", "tensors")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        read = file.weights(heads, config.get("num_key_value_heads", heads))
        for done, (name, values) in enumerate(read, start=1):
            # A copy: what needs no dequantising is a window into the read-only file.
            yield name, torch.tensor(values).to(DTYPES[stored])
            display.step(min(done, len(file)), len(file))

    parameters = write_weights(directory, tensors())
    general = {
        key: file.metadata[f"general.{key}"]
        for key in ("name", "organization", "license", "languages")
        if file.metadata.get(f"general.{key}")
    }
    return {
        "model": config["model_type"],
        "parameters": parameters,
        "files": [path],
        "general": general,
        "tensor_types": file.types(),
    }


def _from_directory(source: Path, directory: Path, dtype: Kept, display: Display) -> dict[str, Any]:
    """Take over a Hugging Face directory; returns what the lineage says of it."""
    from instar.exchange.card import front_matter
    from instar.exchange.weights import DTYPES, INDEX, StoredWeights, write_weights

    for name in ("config.json", *TOKENIZER[:2]):
        if not (source / name).is_file():
            raise UserError(
                f"{source} has no {name}",
                "Name a directory as transformers saves it, with its tokenizer.",
            )
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copy(source / name, directory)
    config = read_json(source / "config.json")
    with StoredWeights(source) as weights:
        parameters = sum(_product(weights.shape(name)) for name in weights)
        if dtype == "keep":
            for number, path in enumerate(weights.files, start=1):
                shutil.copy(path, directory)
                display.step(number, len(weights.files))
            if (source / INDEX).is_file():
                shutil.copy(source / INDEX, directory)
        else:

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for number, name in enumerate(weights, start=1):
                    yield name, weights[name].to(DTYPES[dtype])
                    display.step(number, len(weights))

            write_weights(directory, tensors())
            config.pop("torch_dtype", None)  # its name before transformers 5
            config["dtype"] = dtype
            write_json(directory / "config.json", config)
        files = [*weights.files, source / "config.json", source / "tokenizer.json"]
    said = front_matter(source / "README.md")
    general = {key: said[key] for key in ("license", "base_model") if said.get(key)}
    if said.get("language"):
        general["languages"] = said["language"]
    return {
        "model": config.get("model_type", "an unknown family"),
        "parameters": parameters,
        "files": files,
        "general": general,
    }


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _check(directory: Path) -> None:
    """Open what was written as a stage would: every tensor in its place, the tokenizer whole.

    Raises:
        UserError: It is a model that instar does not have.
    """
    from instar.checkpoint import load_causal_lm
    from instar.tokenizer.hf import Tokenizer

    try:
        load_causal_lm(directory)
        Tokenizer.load(directory)
    except UserError as error:
        told = error.problem.replace(f"{directory}/", "").replace(str(directory), "the model")
        raise UserError(f"instar cannot run this model: {told}", error.remedy) from None


def _write_lineage(
    directory: Path, source: str, dtype: Kept, made: dict[str, Any], watch: Stopwatch
) -> None:
    import instar
    from instar.lineage import write_lineage

    record = {
        "config": {"stage": "import", "source": source, "dtype": dtype},
        "data": {path.name: hash_file(path) for path in made["files"]},
        "parents": {},
        "version": instar.__version__,
    }
    said = {key: value for key, value in made.items() if key != "files"}
    whole = record | {"fingerprint": hash_value(record), "stage": "import"} | said
    cost = Cost(wall_s=watch.wall_s, cpu_s=watch.cpu_s, peak_rss_bytes=peak_rss_bytes())
    write_lineage(directory, whole, cost)
