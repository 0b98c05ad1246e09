from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from instar.checkpoint import read_model_config, save_model
from instar.generation import Engine, Request
from instar.model import CausalLM, ModelConfig
from instar.model.transformer import initialize
from instar.serving.app import Rules, create_app
from instar.serving.served import Served, load
from instar.serving.worker import Writing
from instar.tokenizer.hf import save_tokenizer

CONTEXT = 128

# The first answer may wait for code to be compiled, on a busy machine longer than httpx does.
for kind in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, kind, 60.0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two stages: random models that know bytes and control tokens."""
    run = tmp_path_factory.mktemp("run")
    config = ModelConfig(
        vocab_size=262,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    for seed, stage in enumerate(("sft", "rlvr")):
        _random_model(config, seed, run / stage)
    return run


def _random_model(config: ModelConfig, seed: int, directory: Path) -> None:
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(seed))
    save_model(model, directory)
    save_tokenizer(directory, [], config.max_position_embeddings)


@pytest.fixture(scope="session")
def models(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    """Both stages and one of a longer context; every server of a test has them in turn."""
    wide = tmp_path_factory.mktemp("wide")
    config = read_model_config(runs / "sft").model_copy(update={"max_position_embeddings": 2048})
    _random_model(config, 3, wide)
    return load({"sft": runs / "sft", "rlvr": runs / "rlvr", "wide": wide})


@pytest.fixture
def thinker(runs: Path, tmp_path: Path) -> Path:
    """A stage whose tokenizer has a token for each tag of thinking, in place of two odd bytes."""
    shutil.copytree(runs / "sft", tmp_path / "thinker")
    file = tmp_path / "thinker" / "tokenizer.json"
    rust = json.loads(file.read_text(encoding="utf-8"))
    for tag, byte in (("<think>", "\u00fe"), ("</think>", "\u00ff")):
        id = rust["model"]["vocab"].pop(byte)
        rust["model"]["vocab"][tag] = id
        added = {"id": id, "content": tag, "special": False}
        rust["added_tokens"].append(rust["added_tokens"][0] | added)
    file.write_text(json.dumps(rust), encoding="utf-8")
    return tmp_path / "thinker"


class Running(uvicorn.Server):
    """A server in a thread of this process, at a free port."""

    def __init__(self, app: FastAPI) -> None:
        self.state = app.state.server
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=20)
        super().__init__(config)

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
        """Ask anything."""
        return httpx.post(self.url + path, timeout=30, **options)

    def ask(self, **body: Any) -> httpx.Response:
        """Ask for a chat of four tokens."""
        hello = [{"role": "user", "content": "hi there"}]
        return self.post(json={"messages": hello, "max_tokens": 4, **body})

    @staticmethod
    def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
        """What an answer of that status says, in OpenAI's shape."""
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    @contextmanager
    def running(self) -> Iterator[Running]:
        def serve() -> None:
            asyncio.run(self.serve([self.socket]))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            until(lambda: self.started)
            yield self
        finally:
            self.should_exit = True
            thread.join(30)
            self.socket.close()


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds; a test that waits too long has failed."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def waiting() -> Callable[[Callable[[], bool]], None]:
    """``until``, which tests cannot import from here."""
    return until


@pytest.fixture(scope="session")
def running() -> Callable[[FastAPI], contextmanager[Running]]:
    """Run an app at a free port: ``with running(app) as server``."""
    return lambda app: Running(app).running()


@pytest.fixture
def serving(models: list[Served]) -> Callable[..., contextmanager[Running]]:
    """Start a server: ``with serving(rate=3) as server`` takes what ``Rules`` takes."""

    def begin(screen: object = None, **rules: object) -> contextmanager[Running]:
        return Running(create_app(models, Rules(**rules), screen)).running()

    return begin


@pytest.fixture
def server(serving: Callable[..., contextmanager[Running]]) -> Iterator[Running]:
    """A server with the usual rules."""
    with serving() as running:
        yield running


@pytest.fixture
def wishes(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the server asks its engines, as it comes."""
    found, worker = list[Request](), server.state.worker
    write = worker.write

    async def noted(engine: Engine, requests: Sequence[Request], every_step: bool) -> Writing:
        found.extend(requests)
        return await write(engine, requests, every_step)

    monkeypatch.setattr(worker, "write", noted)
    return found
