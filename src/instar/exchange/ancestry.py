"""The stages that a checkpoint has gone through, read from the chain of ``lineage.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instar.adapters.opening import content_of
from instar.errors import UserError
from instar.files import read_json
from instar.lineage import LINEAGE


@dataclass(frozen=True)
class Link:
    """One directory of the chain.

    Attributes:
        directory: Where it lies, or lay.
        lineage: Its ``lineage.json``; empty where it is gone.
        exams: Exam to score, stderr and n.
        changed: It has been made again since the next one was made from it, so that what it says
            now is not of this model; then the two above are empty.
    """

    directory: Path
    lineage: dict[str, Any] = field(default_factory=dict)
    exams: dict[str, Any] = field(default_factory=dict)
    changed: bool = False

    @property
    def stage(self) -> str:
        """The name of the stage; that of the directory where nothing says it."""
        return self.lineage.get("stage") or self.directory.name


def ancestry(directory: Path) -> list[Link]:
    """The chain of a checkpoint, oldest first, itself last.

    Parents come before their children, each once; so do directories that only gave data.
    """
    chain: list[Link] = []
    seen: set[Path] = set()

    def visit(place: Path, recorded: str | None) -> None:
        if place in seen:
            return
        seen.add(place)
        link = _link(place, recorded)
        run = place.parent  # what `{run}` stands for in a stage's paths
        for path, content in link.lineage.get("parents", {}).items():
            visit(_at(path, run), content)
        for path in link.lineage.get("data", {}):
            source = _at(path, run).parent
            # A stage that wrote data; the files' own hashes are in the child's lineage.
            if source != place and (source / LINEAGE).is_file():
                visit(source, None)
        chain.append(link)

    visit(directory, None)
    return chain


def _at(path: str, run: Path) -> Path:
    return Path(path.replace("{run}", str(run)))


def _link(place: Path, recorded: str | None) -> Link:
    if recorded is not None and _content(place) != recorded:
        return Link(place, changed=True)
    lineage = read_json(place / LINEAGE) if (place / LINEAGE).is_file() else {}
    exams = place / "exams.json"
    return Link(place, lineage, read_json(exams)["exams"] if exams.is_file() else {})


def _content(place: Path) -> str | None:
    """Hash of a parent; none where it is gone, or an adapter whose base is."""
    try:
        return content_of(place)
    except UserError:
        return None


def general_of(chain: list[Link]) -> dict[str, Any]:
    """What is known of a model by its chain: name, licence, languages, base model.

    What a base was given when it was imported holds for what is made of it.
    """
    general: dict[str, Any] = {}
    for link in chain:
        general |= link.lineage.get("general", {})
        if "primer" in link.lineage:
            general["languages"] = ["en", "zh"]
        source = link.lineage.get("config", {}).get("source", "")
        if link.stage == "import" and is_hub_id(source):
            general["base_model"] = source
    return general


def is_hub_id(source: str) -> bool:
    """Whether a name could be a model of the hub: owner/name, and no file or directory."""
    parts = source.split("/")
    plain = all(part and not part.startswith(".") for part in parts)
    return len(parts) == 2 and plain and not source.endswith(".gguf") and not Path(source).exists()
