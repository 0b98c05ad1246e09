"""Where recipes are found: a folder of YAML files for a life, a single one for a corpus."""

from __future__ import annotations

from pathlib import Path

from instar.errors import UserError

PACKAGED = Path(__file__).parent / "recipes"
"""Where an installed package carries them."""
CHECKOUT = Path(__file__).parents[2] / "recipes"
"""Where they are in a checkout."""


def known() -> list[str]:
    """Names of the recipes that come with instar."""
    roots = [root for root in (PACKAGED, CHECKOUT) if root.is_dir()]
    return sorted({f.parent.name for root in roots for f in root.glob("*/life.yaml")})


def find(name: str) -> Path:
    """The folder of a recipe: a path, or the name of one that comes with instar.

    Raises:
        UserError: There is none.
    """
    for folder in (Path(name), PACKAGED / name, CHECKOUT / name):
        if folder.is_file() and folder.name == "life.yaml":
            return folder.parent
        if (folder / "life.yaml").is_file():
            return folder
    raise UserError(
        f"no recipe {name!r}: there is no {Path(name) / 'life.yaml'}",
        f"Known recipes: {', '.join(known())}.",
    )


def known_corpora() -> list[str]:
    """Names of the corpus recipes that come with instar."""
    roots = [root / "corpus" for root in (PACKAGED, CHECKOUT)]
    return sorted({f.stem for root in roots if root.is_dir() for f in root.glob("*.yaml")})


def find_corpus(name: str) -> Path:
    """The file of a corpus recipe: a path, or the name of one that comes with instar.

    Raises:
        UserError: There is none.
    """
    for file in (Path(name), *(root / "corpus" / f"{name}.yaml" for root in (PACKAGED, CHECKOUT))):
        if file.is_file():
            return file
    raise UserError(
        f"no corpus recipe {name!r}", f"Give a YAML file, or one of: {', '.join(known_corpora())}."
    )
