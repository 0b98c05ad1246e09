from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Gt
from pydantic import ValidationError, model_validator

from instar.config import Config, override, read_config, read_yaml
from instar.errors import UserError


class Inner(Config):
    lr: Annotated[float, Gt(0)] = 0.1
    """Step size."""


class Outer(Config):
    name: str
    inner: Inner = Inner()
    low: int = 1
    high: int = 2

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_file_becomes_a_record(tmp_path: Path) -> None:
    path = written(tmp_path, "name: 春\ninner: {lr: 3e-4}\n")
    config = read_config(Outer, path)
    assert config == Outer(name="春", inner=Inner(lr=3e-4))
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"name": "a", "lr": 1}, "here: unknown key `lr`.*Check its spelling"),
        ({"name": "a", "inner": {"lrr": 1}}, r"here: unknown key `inner\.lrr`"),
        ({}, "here: `name` is missing.*Add it"),
        ({"name": "a", "inner": {"lr": -1}}, r"here: `inner\.lr` is -1: .*greater than 0"),
        ({"name": "a", "inner": {"lr": "fast"}}, r"`inner\.lr` is 'fast'"),
        ({"name": "a", "low": 5}, "here: `the record`: low 5 is above high 2. Change"),
        ({"x": 1, "y": 2}, r"\(2 more mistakes after it\)"),
    ],
)
def test_mistakes_name_field_value_and_remedy(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        Outer.parse(values, "here")
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [1, 2\nlow: 3\n", r"a\.yaml, line \d is not YAML.*Mend"),
        ("- a\n- b\n", r"a\.yaml does not hold"),
        ("", r"a\.yaml does not hold"),
        ("name: 春".encode("gb18030"), r"a\.yaml is not UTF-8 \(byte 6\)"),
    ],
)
def test_broken_files(tmp_path: Path, text: str | bytes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_yaml(written(tmp_path, text))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*b\.yaml"):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(UserError, match=r"is a directory.*Name the YAML file"):
        read_yaml(tmp_path)


def test_options_change_single_fields() -> None:
    config = Outer(name="a", inner=Inner(lr=0.5), high=9)
    changed = override(config, ["--inner.lr", "0.25", "--low", "3"], "p", "d")
    assert changed == Outer(name="a", inner=Inner(lr=0.25), low=3, high=9)
    assert override(config, [], "p", "d") is config


@pytest.mark.parametrize(
    ("args", "told"),
    [(["--inner.lr", "-1"], "lr.* is -1"), (["--low", "7"], "low 7 is above high 2")],
)
def test_options_are_checked(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=f"command line: .*{told}"):
        override(Outer(name="a"), args, "p", "d")
    shown = capsys.readouterr()
    assert shown.out == shown.err == "", "the error is said once"


def test_unknown_options_leave_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        override(Outer(name="a"), ["--loww", "1"], "p", "d")
    assert caught.value.code == 2
    assert "--loww" in capsys.readouterr().err


def test_every_recipe_is_valid() -> None:
    from instar.grow import LifeConfig, read_stage
    from instar.recipes import find, known

    assert {"mini", "smoke"} <= set(known())
    for name in known():
        folder = find(name)
        life = read_config(LifeConfig, folder / "life.yaml")
        for stage in life.stages:
            assert read_stage(folder / f"{stage}.yaml", Path("run")).run == Path("run")
        assert set(life.compare) <= set(life.stages)
        assert not life.compare or {life.against, life.judge} <= set(life.stages)


def test_defaults_are_within_their_own_limits() -> None:
    """Pydantic does not check defaults; this does."""
    from instar.stages.registry import STAGES

    for stage in STAGES.values():
        training = {"training": {"steps": 1}} if "training" in stage.config.model_fields else {}
        config = stage.config.parse(training, stage.name)
        again = stage.config.parse(config.model_dump(), stage.name)
        assert again == config
