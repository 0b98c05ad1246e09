"""Where recipes are found: a folder of YAML files, one a stage and one for the whole life."""

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
