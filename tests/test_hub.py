"""Names of the hub, against a cache made by hand and against a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from instar.errors import UserError
from instar.hub import located

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": b"weights",
    "merges.txt": b"#version\n",
    "README.md": b"words",
    "pytorch_model.bin": b"a pickle",
    "onnx/config.json": b"{}",
    "consolidated.safetensors": b"the same weights",
}
WANTED = ["config.json", "merges.txt", "model.safetensors"]


def cached(cache: Path, name: str) -> Path:
    """A model in the hub's cache, as a download leaves it."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_bytes(FILES["config.json"])
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_directory_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert located(Path("owner/model")) == Path("owner/model")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B"])
def test_what_was_fetched_is_found_without_a_network(name: str, cache: Path, offline: None) -> None:
    snapshot = cached(cache, name)
    assert located(Path(name)) == snapshot


def test_the_environment_says_where_the_cache_is(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", "openai-community/gpt2-medium")
    code = (
        "from pathlib import Path; from instar.hub import located;"
        "print(located(Path('openai-community/gpt2-medium')))"
    )
    source = Path(__file__).parents[1] / "src"
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)}
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == str(snapshot)


def test_nothing_cached_and_no_network(cache: Path, offline: None) -> None:
    with pytest.raises(UserError, match=r"no directory runs/sft, .*cannot be reached.*nothing of"):
        located(Path("runs/sft"))


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "../model", "a/b/c", "model with spaces", "runs/-x", "a/b--c"]
)
def test_other_paths_are_only_paths(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"no such directory: .*Check the path, or give the name"):
        located(Path(path))


@pytest.mark.parametrize("path", ["model.gguf", "runs/model.gguf"])
def test_a_missing_file_is_not_asked_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"no such file: .*model.gguf"):
        located(Path(path))


def test_a_gguf_file_is_to_be_imported(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UserError, match=r"instar import .*model.gguf --out DIR; then name DIR"):
        located(file)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one download needs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "gated/" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "ours/broken" in path:
            self.answer(418, b"{}", {})
        elif "ours/model" not in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.tag(data)}
                for name, data in FILES.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {})
        elif path.startswith("/api/models"):
            info = {"id": "ours/model", "sha": COMMIT, "siblings": []}
            self.answer(200, json.dumps(info).encode(), {})
        else:
            data = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            headers = {"ETag": f'"{self.tag(data)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, data, headers)

    def tag(self, data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_read_is_fetched(hub: None) -> None:
    found = located(Path("ours/model"))
    assert sorted(path.name for path in found.rglob("*") if path.is_file()) == WANTED
    assert (found / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ours/unknown", r"has no model of that name.*HF_TOKEN"),
        ("gated/model", r"agreed to its terms.*huggingface\.co/gated/model.*HF_TOKEN"),
        ("ours/broken", r"hub.*hf download ours/broken"),
    ],
)
def test_what_the_hub_refuses(hub: None, name: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"no directory {name}.*{told}"):
        located(Path(name))


def test_half_a_download_is_not_taken_for_a_model(
    hub: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (located(Path("ours/model")) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="holds a part of that model"):
        located(Path("ours/model"))
