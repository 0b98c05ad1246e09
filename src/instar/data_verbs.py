"""``instar data``: verbs for raw text and training data, each imported only when it is called."""

from __future__ import annotations

import argparse
from importlib import import_module

import tyro

VERBS: dict[str, tuple[str, str]] = {
    "inspect": ("instar.data.verbs", "say which format a file is in, and show some of it"),
    "prepare": ("instar.corpus.verb", "make a corpus from raw text, every document accounted for"),
    "report": ("instar.report.corpus", "draw a corpus' accounts as a page"),
}
"""Verb to the module with the function of that name, and what it does."""


def main(argv: list[str]) -> int:
    """Run ``instar data`` with the arguments after it."""
    parser = argparse.ArgumentParser(
        prog="instar data",
        description="Make a corpus from raw text, and look into files of training data. "
        "(`instar data RECIPE/data.yaml` writes the primer.)",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (_, what) in VERBS.items():
        verbs.add_parser(name, help=what)
    verb = parser.parse_args(argv[:1]).verb
    module, _ = VERBS[verb]
    tyro.cli(getattr(import_module(module), verb), prog=f"instar data {verb}", args=argv[1:])
    return 0
