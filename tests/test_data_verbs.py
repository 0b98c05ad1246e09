"""``instar data``: each verb explains itself, and only its own module is imported."""

import subprocess
import sys

import pytest

from instar.data_verbs import VERBS, main


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"instar data {verb}" in capsys.readouterr().out


def test_help_names_all_verbs_and_a_wrong_one_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown and what.split()[0] in shown for verb, (_, what) in VERBS.items())
    with pytest.raises(SystemExit) as caught:
        main(["paint"])
    assert caught.value.code == 2


def test_a_report_needs_neither_torch_nor_what_prepares_a_corpus():
    code = (
        "import sys, instar.report.corpus;"
        "print([m for m in ('torch', 'pyarrow', 'daft', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
