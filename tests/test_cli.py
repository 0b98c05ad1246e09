from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from instar import cli
from instar.errors import UserError

ROOT = Path(__file__).parents[1]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["instar", *arguments])
    return cli.main()


def process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from instar.cli import main; sys.argv = ['instar', '--help']; main();"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'tyro', 'rich') if m in sys.modules])"
    )
    shown = process(code)
    assert shown.splitlines()[-1] == "[]"
    assert all(verb in shown for verb in cli.VERBS)


def test_the_allocator_is_told_before_torch_allocates() -> None:
    code = (
        "import sys; from instar import cli;"
        "cli.keep_freed_memory = lambda: print('torch' in sys.modules);"
        "sys.argv = ['instar', 'report', 'nowhere']; cli.main()"
    )
    assert process(code).splitlines()[0] == "False"


@pytest.mark.parametrize(
    "module",
    ["errors", "config", "files", "data.schema", "data.readers", "primer.mixture", "tokenizer.chat",
     "rollout.verifiers", "report.page"],
)  # fmt: skip
def test_these_do_not_need_torch(module: str) -> None:
    code = f"import sys, instar.{module}; print('torch' in sys.modules)"
    assert process(code).strip() == "False"


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, verb, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"instar {verb}" in shown and len(shown) > 100


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("grow", "pretraining learn from it in place"),  # a dataclass
        ("grow", "are kept; an interrupted one goes on where"),  # its own docstring
        ("merge", "equal ones by default. Of `ties`"),
        ("sft", "After twenty skipped in a row, the run goes back"),  # a record within another
        ("sft", "all of it (WiSE-FT"),  # a line that begins with no letter
    ],
)
def test_sentences_of_help_flow(
    verb: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        call(monkeypatch, verb, "--help")
    assert told in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("columns", [60, 100])
def test_help_breaks_lines_between_words(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        call(monkeypatch, "serve", "--help")
    above = capsys.readouterr().out.partition("╭")[0]
    lines = [line for line in above.splitlines() if not line.startswith(" ")]
    assert max(map(len, lines)) <= columns and "Adapters of one base share it" in " ".join(lines)
    assert "  instar serve runs/mini/sft runs/mini/rlvr" in above.splitlines(), "as it is set in"


def test_who_reads_no_further_is_told_nothing() -> None:
    command = [sys.executable, "-m", "instar", "sft", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writing:
        assert writing.stdout is not None and writing.stderr is not None
        writing.stdout.close()
        assert writing.stderr.read() == b"" and writing.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_usage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "usage: instar" in shown and "--debug" in shown and "--version" in shown


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import instar

    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"instar {instar.__version__}\n"


PRETRAIN = "stage: pretrain\ntraining: {{steps: 2, optimizer: {{lr: {lr}}}}}\n{more}"


@pytest.mark.parametrize(
    ("verb", "text", "told"),
    [
        ("pretrain", PRETRAIN.format(lr=0.1, more="colour: red\n"), "unknown key `colour`"),
        ("pretrain", PRETRAIN.format(lr=-0.1, more=""), "`training.optimizer.lr` is -0.1"),
        ("pretrain", "training: [1,\n", "is not YAML"),
        ("pretrain", "stage: pretrain\n", "`training` is missing"),
        ("sft", PRETRAIN.format(lr=0.1, more=""), "`stage` is 'pretrain'"),
        ("pretrain", None, "no such file"),
        ("grow", None, "no recipe"),
        ("chat", None, "none.yaml"),
        ("generate", None, "none.yaml"),
        ("report", None, "none.yaml"),
    ],
)
def test_mistakes_are_one_line_and_code_two(
    verb: str,
    text: str | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / ("none.yaml" if text is None else "a.yaml")
    if text is not None:
        path.write_text(text)
    prompt = ["--prompt", "hello"] if verb == "generate" else []
    assert call(monkeypatch, verb, str(path), *prompt) == cli.USER_ERROR
    shown = capsys.readouterr()
    assert shown.err.startswith("instar: ") and shown.err.count("\n") == 1
    assert told in shown.err and "Traceback" not in shown.err and shown.out == ""


def test_an_unknown_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "dance") == cli.USER_ERROR
    assert "no verb 'dance'. Known: grow" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["pretrain", str(tmp_path / "none.yaml")]
    arguments.insert(place, "--debug")
    with pytest.raises(UserError, match="no such file"):
        call(monkeypatch, *arguments)


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(verb: str, rest: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", run)
    return call(monkeypatch, "grow")


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.57 GiB"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; what was saved is kept"),
        (UserError("the lamp is off", "Switch it on."), 2, "the lamp is off. Switch it on."),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 2, "(a.bin). Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "(/x). Choose a place"),
        (torch.OutOfMemoryError(CUDA), 2, "another 2.00 GiB were asked for. To train with less"),
        (RuntimeError("can't allocate memory: tried to allocate 9 bytes."), 2, "another 9 bytes"),
        (MemoryError(), 2, "not enough memory. To train with less, lower micro_batch"),
        (RuntimeError("oops"), 1, "RuntimeError: oops. This is a fault of ours"),
    ],
)
def test_exceptions_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert raising(error, monkeypatch) == code
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1


def test_ctrl_c_in_a_run_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from instar.training.interrupt import Interrupted

    assert raising(Interrupted(), monkeypatch) == 130
    assert raising(Interrupted(signal.SIGTERM), monkeypatch) == 143
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--until", "dance"], "no stage 'dance'. It has: data"),
        (["--only", "sft", "--skip", "sft"], "leave no stage to run"),
        (["--only", "dpo", "--until", "sft"], "leave no stage to run"),
    ],
)
def test_impossible_choices_of_stages(
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "grow", "smoke", "--out", str(tmp_path / "run"), *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_choices_of_stages() -> None:
    from instar.grow import Arguments, choose

    stages = ["data", "tokenizer", "sft", "dpo"]
    assert choose(stages, Arguments()) == stages
    assert choose(stages, Arguments(until="sft")) == ["data", "tokenizer", "sft"]
    assert choose(stages, Arguments(only=["dpo", "data"])) == ["data", "dpo"]
    assert choose(stages, Arguments(skip=["data"], until="sft")) == ["tokenizer", "sft"]


def test_trackers_and_sharding_of_a_whole_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instar import grow
    from instar.stages.config import StageConfig, TrainedStageConfig

    met: list[dict[str, StageConfig]] = []
    monkeypatch.setattr(grow, "grow", lambda life, configs, run, display: met.append(configs))
    command = ("grow", "smoke", "--out", str(tmp_path / "run"))
    options = ("--track", "tensorboard", "wandb", "--parallel", "zero3")
    assert call(monkeypatch, *command) == 0
    assert call(monkeypatch, *command, *options) == 0
    means = {"training": {"track", "parallel"}}
    for plain, told in zip(met[0].values(), met[1].values(), strict=True):
        assert told.model_dump(exclude=means) == plain.model_dump(exclude=means)
        if isinstance(told, TrainedStageConfig):
            assert told.training.track == ["tensorboard", "wandb"]
            assert told.training.parallel == "zero3"
        else:
            assert told == plain


# tyro warns, where nobody sees it, that it had to look inside the union of methods.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["all-linear"], "all-linear"),
        ([r"model\.layers\.[01]\..*"], r"model\.layers\.[01]\..*"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "layers.0.mlp.up_proj"], ["q_proj", "layers.0.mlp.up_proj"]),
    ],
)
def test_targets_on_the_command_line(words: list[str], meant: list[str] | str) -> None:
    from instar.stages import verb
    from instar.stages.config import TrainedStageConfig

    chosen = ["--adapter", "lora", "--adapter.targets", *words]
    config = verb.read("sft", ROOT / "recipes" / "mini" / "sft.yaml", chosen, "instar sft")
    assert isinstance(config, TrainedStageConfig) and config.adapter
    assert config.adapter.model_dump()["targets"] == meant


def test_every_adapter_that_help_names_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from instar.stages import verb
    from instar.stages.config import TrainedStageConfig

    path = ROOT / "recipes" / "mini" / "sft.yaml"
    assert {"lora", "dora", "ia3", "prompt"} <= set(verb.ADAPTERS)
    for name in (*verb.ADAPTERS, "none"):
        config = verb.read("sft", path, ["--adapter", name], "instar sft")
        assert isinstance(config, TrainedStageConfig)
        assert (config.adapter.method if config.adapter else "none") == name
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        call(monkeypatch, "sft", "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert f"({', '.join(verb.ADAPTERS)}, none)" in told
