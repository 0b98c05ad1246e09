"""How pages are filled in: everything escaped, nothing missing, numbers as people write them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """A template of this package; all of them share ``look.html.jinja``.

    Whatever is filled in is text, never markup, unless it is a ``Markup``; a name that is not
    there is an error.

    Args:
        name: File name, such as ``page.html.jinja``.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: files("instar.report").joinpath(name).read_text(encoding="utf-8")
        ),
    )
    environment.filters |= {"duration": duration, "amount": amount, "size": size}
    return environment.get_template(name)


def duration(seconds: float) -> str:
    """Seconds in words: ``8.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount(number: float) -> str:
    """A number to three digits: ``940``, ``3.41 M``; large ones as powers of ten."""
    if number >= 1e15:
        digits, power = f"{number:.2e}".split("e")
        return f"{digits} × 10^{int(power)}"
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def size(count: int) -> str:
    """Bytes to three digits: ``940 B``, ``3.41 MB``."""
    return f"{count} B" if count < 1000 else f"{amount(count)}B"


def as_yaml(value: Any) -> str:
    """A config as its user would write it."""
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).rstrip()
