"""`instar serve` as a process: it starts, is killed, starts again, and ends in good order."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import tyro

from instar.errors import UserError
from instar.machine import memory_bytes
from instar.serving.verb import Options, main

BODY = {
    "messages": [{"role": "user", "content": "hi there"}],
    "max_tokens": 100,
    "logit_bias": {"3": -100, "5": -100},
    "stream": True,
}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def process(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "instar.cli", "serve", str(directory), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ})
    try:
        yield server
    finally:
        server.kill()
        server.communicate()


def answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def test_killed_and_started_again(runs: Path, port: int, waiting: Callable[..., None]) -> None:
    url = f"http://127.0.0.1:{port}"
    with process(runs / "sft", port) as server:
        waiting(lambda: answers(url), 60)
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream("POST", url + "/v1/chat/completions", json=BODY) as answer,
        ):
            for number, _ in enumerate(answer.iter_raw()):
                if number == 1:
                    server.kill()
        server.wait(10)
    with process(runs / "sft", port) as server:
        waiting(lambda: answers(url), 60)
        lines = list[str]()
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", url + "/v1/chat/completions", json=BODY) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(20)
        server.send_signal(signal.SIGTERM)
        reader.join(30)
        assert "data: [DONE]" in lines, "what ran was finished"
        _, said = server.communicate(timeout=20)
        assert server.returncode == 0
        assert said.splitlines()[-1].startswith(b"INFO:     Finished server process")


def test_a_port_that_is_taken(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with process(runs / "sft", taken.getsockname()[1]) as server:
            _, said = server.communicate(timeout=60)
    assert server.returncode == 2
    assert b"Traceback" not in said and b"port" in said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no model is named"),
        (["{runs}/nothing"], "no such directory"),
        (["{runs}/sft", "{runs}/sft"], "two models are called 'sft'"),
        (["{runs}/sft", "--queue", "0"], "--queue is 0"),
        (["{runs}/sft", "--port", "70000"], "--port is 70000"),
        (["{runs}/sft", "--rate", "-1"], "--rate is -1"),
        (["{runs}/sft", "--cache-gib", "nan"], "--cache-gib is nan"),
        (["{runs}/sft", "--safety-log", "log.jsonl"], "without --safety"),
        (["{runs}/sft", "--name", "https://my.example"], "--name is 'https://my.example'"),
        (["{runs}/sft", "--name", "my.example:80"], "--name is 'my.example:80'"),
    ],
)
def test_mistakes_on_the_command_line(runs: Path, arguments: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        main([argument.format(runs=runs) for argument in arguments])


def test_an_unknown_option_ends_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["m", "--quue", "3"])
    assert ended.value.code == 2 and "--quue" in capsys.readouterr().err


def test_keys_names_and_origins_are_given_one_by_one() -> None:
    argv = [
        "--api-key",
        "a",
        "--api-key",
        "b",
        "--name",
        "c",
        "--name",
        "d",
        "--cors",
        "*",
        "m",
        "n",
    ]
    options = tyro.cli(Options, args=argv)
    assert options.models == ("m", "n"), "what follows a key is no further key"
    assert (options.api_key, options.name, options.cors) == (("a", "b"), ("c", "d"), ("*",))


def test_keys_come_from_the_environment_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSTAR_API_KEYS", "one, two,")
    rules = Options(models=("m",), api_key=("three",), host="0.0.0.0").rules()
    assert list(rules.keys) == ["three", "one", "two"] and not rules.hosts
    assert not capsys.readouterr().err
    monkeypatch.delenv("INSTAR_API_KEYS")
    assert Options(models=("m",)).rules().hosts, "only this machine's own names"
    named = Options(models=("m",), name=("host.docker.internal", "Box.lan")).rules().hosts
    assert {"localhost", "host.docker.internal", "box.lan"} < set(named)
    assert not capsys.readouterr().err
    Options(models=("m",), host="0.0.0.0").rules()
    assert "--api-key" in capsys.readouterr().err


def test_strangers_do_not_vote_unless_asked_to() -> None:
    def file(*argv: str) -> Path | None:
        options = tyro.cli(Options, args=["m", *argv])
        return options.votes_file(options.api_key)

    assert file() == file("--host", "0.0.0.0", "--api-key", "k") == Path("votes.jsonl")
    assert file("--host", "0.0.0.0") is file("--votes", "None") is None
    assert file("--host", "0.0.0.0", "--votes", "mine.jsonl") == Path("mine.jsonl")


def test_memory_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("instar.distributed.default_device", lambda: cpu)
    assert Options(models=("m",)).cache_bytes() == memory_bytes(cpu) // 4
    assert Options(models=("m",), cache_gib=0.5).cache_bytes() == 2**29


def test_a_key_that_is_empty_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("", " ", ",", "a,,b", ",a"):
        monkeypatch.setenv("INSTAR_API_KEYS", told)
        with pytest.raises(UserError, match="INSTAR_API_KEYS is empty"):
            Options(models=("m",), api_key=("b",)).rules()
    monkeypatch.delenv("INSTAR_API_KEYS")
    for keys in (("",), ("a", " ")):
        with pytest.raises(UserError, match="--api-key is empty"):
            Options(models=("m",), api_key=keys).rules()


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.inf, math.nan])
def test_time_without_end_is_no_time(timeout: float) -> None:
    with pytest.raises(UserError, match="--timeout is"):
        Options(models=("m",), timeout=timeout).rules()
