"""The model card: a README.md that says what a model is, from its lineage and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from instar.adapters.methods import OWN
from instar.errors import UserError
from instar.exchange.ancestry import Link, ancestry, general_of, is_hub_id
from instar.exchange.chat_template import chat_template
from instar.files import read_json, write_text
from instar.report.templates import amount, as_yaml, duration, size

MARK = "written by `instar export --to card`; it may be written anew"
"""Stands in every card, so that nobody's own README is replaced."""

CHATS = ("sft", "dpo", "ppo", "rlvr", "import")
"""Stages after which a model with a chat template is a partner in conversation."""

UNMERGED = ("PREFIX_TUNING", "PROMPT_TUNING", "bottleneck")
"""Methods that are no change of weights, as `adapter_config.json` calls them."""


def write_card(directory: Path, out: Path, license: str = "") -> None:
    """Write the card of a checkpoint or of an adapter.

    Args:
        directory: What it is about.
        out: Usually ``README.md`` in it.
        license: As the hub calls it, such as ``apache-2.0``; by default that of the base.

    Raises:
        UserError: A README of somebody's own is in the way, or the directory is no checkpoint.
    """
    if out.is_file() and MARK not in out.read_text(encoding="utf-8"):
        raise UserError(f"{out} exists, and instar has not written it", "Choose another --out.")
    write_text(out, card(directory, license))


def card(directory: Path, license: str = "") -> str:
    """The text of the card; see ``write_card``."""
    adapter = directory / "adapter_config.json"
    described = adapter if adapter.is_file() else directory / "config.json"
    if not described.is_file():
        raise UserError(
            f"{directory} is not a checkpoint: it has no config.json",
            "Name a directory that a stage has written.",
        )
    config = read_json(described)
    chain = ancestry(directory)
    general = general_of(chain)
    if adapter.is_file():
        general |= _base_of(config, general)
    if license:
        general["license"] = license
    own = config.get(OWN, {})
    trained = [link for link in chain if link.lineage.get("steps")]
    last = chain[-1]
    chats = bool(_template(directory)) and last.stage in CHATS
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = files("instar.exchange").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        mark=MARK,
        name=directory.resolve().name,
        adapter=adapter.is_file(),
        own=bool(own),
        mergeable=config.get("peft_type", own.get("method")) not in UNMERGED,
        front=_front(general, config, chats, adapter.is_file()),
        summary=_summary(chain, config, general),
        chats=chats,
        stages=[_row(link) for link in trained],
        cost=_cost(trained),
        notes=_notes(chain),
        data=_data(chain),
        exams=[_exam(name, result) for name, result in last.exams.items()],
        exams_note="The questions come from the primer." if "knowledge" in last.exams else "",
        licence=_licence(general),
        recipes=[
            {"stage": link.stage, "yaml": as_yaml(_recipe(link.lineage["config"]))}
            for link in chain
            if link.lineage.get("config")
        ],
    )


def _base_of(config: dict[str, Any], general: dict[str, Any]) -> dict[str, str]:
    """An adapter's base by its name on the hub or that of its directory, without the folders."""
    base = config.get("base_model_name_or_path") or ""
    if is_hub_id(base):
        return {"base_model": base}
    return {"base_model": general.get("base_model") or Path(base).name}


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a README; nothing where there is none."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _template(directory: Path) -> str | None:
    path = directory / "tokenizer_config.json"
    return chat_template(directory, read_json(path)) if path.is_file() else None


def _front(general: dict[str, Any], config: dict[str, Any], chats: bool, adapter: bool) -> str:
    """The keys by which the hub sorts models."""
    base = general.get("base_model")
    bases = [each for each in ([base] if isinstance(base, str) else base or []) if is_hub_id(each)]
    tags = ["instar", config.get("model_type", config.get("peft_type", "")).lower()]
    library = "instar" if OWN in config else "peft" if adapter else "transformers"
    front = {
        "license": general.get("license"),
        "base_model": bases[0] if len(bases) == 1 else bases,
        "language": general.get("languages"),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in [*tags, "conversational" if chats else ""] if tag],
    }
    return as_yaml({key: value for key, value in front.items() if value})


def _summary(chain: Sequence[Link], config: dict[str, Any], general: dict[str, Any]) -> str:
    """What it is, in two sentences."""
    count = chain[-1].lineage.get("parameters")
    many = f"{amount(count)} parameters, " if count else ""
    kind = config.get("model_type") or f"{config.get('peft_type', 'an')} adapter"
    trained = [link.stage for link in chain if link.lineage.get("steps")]
    way = f" Stages: {' → '.join(trained)}." if trained else ""
    imported = [link for link in chain if link.stage == "import"]
    source = general.get("base_model") or ""
    for link in imported:
        path = link.lineage["config"]["source"]
        source = source or link.lineage.get("general", {}).get("name") or Path(path).name
    base = f" It was made from {source}." if source else ""
    return f"A language model: {many}{kind}; made with instar.{base}{way}"


def _row(link: Link) -> list[str]:
    cost = link.lineage["cost"]
    return [
        link.stage,
        f"{link.lineage['steps']:,}",
        amount(cost["tokens"]),
        duration(cost["wall_s"]),
        amount(cost["flops"]),
        size(cost["peak_rss_bytes"]),
    ]


def _cost(trained: Sequence[Link]) -> str:
    """The sum, and the machines."""
    if not trained:
        return ""
    costs = [link.lineage["cost"] for link in trained]
    wall, flops = (sum(cost[key] for cost in costs) for key in ("wall_s", "flops"))
    machines = {
        f"{', '.join(found[name] for name in ('gpu', 'processor') if name in found)}, "
        f"{found['threads']} threads, torch {found['torch']}"
        for link in trained
        if (found := link.lineage.get("environment"))
    }
    return (
        f"In all {duration(wall)} and {amount(flops)} FLOPs (estimated), "
        f"on {' and '.join(sorted(machines)) or 'a machine that is not recorded'}."
    )


def _notes(chain: Sequence[Link]) -> list[str]:
    """What the table does not say."""
    notes = []
    for link in chain:
        if link.changed:
            notes.append(
                f"`{link.directory.name}`, from which it was made, is gone or has been made again "
                "since: what came before is not recorded."
            )
        if link.stage == "import" and link.lineage.get("tensor_types"):
            types = ", ".join(f"{n} x {t}" for t, n in link.lineage["tensor_types"].items())
            notes.append(f"The base came from a GGUF file; its tensors were dequantised ({types}).")
    if not any(link.lineage for link in chain):
        notes.append("This directory has no lineage.json: how it was made is not recorded.")
    return notes


def _data(chain: Sequence[Link]) -> list[list[str]]:
    return [
        [link.stage, f"`{Path(path).name}`", f"`{digest[:16]}`"]
        for link in chain
        for path, digest in link.lineage.get("data", {}).items()
    ]


def _exam(name: str, result: dict[str, Any]) -> list[str]:
    """A row: shares in per cent, bits as they are; one item alone has no error to show."""
    score, error = result["score"], result.get("stderr")
    if name.startswith("bits"):
        shown = f"{score:.3f}" + ("" if error is None else f" ± {error:.3f}")
    else:
        shown = f"{100 * score:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")
    return [name.replace("_", " "), shown, f"{result['n']:,}"]


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    """A stage's config, without the folder that a file was imported from."""
    source = config.get("source")
    if isinstance(source, str) and not is_hub_id(source):
        config = config | {"source": Path(source).name}
    return config


def _licence(general: dict[str, Any]) -> str:
    if general.get("license"):
        return f"{general['license']}"
    if general.get("base_model"):
        return f"That of its base, {general['base_model']}."
    return "None has been stated. Whoever publishes the model chooses one."
