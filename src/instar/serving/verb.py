"""``instar serve``: models behind an address, for every program that speaks OpenAI's API."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from instar.errors import UserError, installing

if TYPE_CHECKING:
    from instar.serving.app import Rules
    from instar.serving.served import Served

SWITCH_S = 2e-4
"""Seconds after which one thread of Python lets another go on. At the usual 5 ms, the web app
would keep the engines waiting at each of their steps for longer than a step takes."""

HOST = re.compile(r"[\w.-]+|\[[\da-fA-F:.]+\]")
"""What a ``Host`` names without its port."""

KEYS = "INSTAR_API_KEYS"
"""Keys in the environment, where no list of processes shows them; commas between them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve models to every program that speaks OpenAI's API.

    A model is called like its directory; write NAME=DIR to call it otherwise. Adapters of one
    base share it. A request names the model it wants, or gets the first one. Only this machine
    can reach the server unless --host says otherwise; give it keys before you do that.

    Chats and completions (/v1/chat/completions, /v1/completions) stream, sample, take a form such
    as a JSON schema (response_format), call tools and give log-probabilities. There are also
    endpoints of models, tokens, health, Prometheus' metrics, and the plain POST /chat of the
    message alone; /openapi.json describes them all. At / there is a page to talk on.

    For example:
      instar serve runs/mini/sft runs/mini/rlvr
      instar serve poet=runs/poems/sft --port 9000 --api-key secret --rate 60
      curl localhost:8000/chat -H "Content-Type: application/json" -d '{"message": "47 + 38 = ?"}'

      from openai import OpenAI
      client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
      messages = [{"role": "user", "content": "What is the capital of France?"}]
      print(client.chat.completions.create(model="sft", messages=messages))
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR...")]
    """Checkpoints, adapters, or names on the Hugging Face hub; NAME=DIR gives a name."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one that this machine has."""
    port: int = 8000
    """The port to listen at; 0 takes any that is free."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that is accepted; give several one by one: --api-key A --api-key B. INSTAR_API_KEYS in
    the environment, with commas, is more private."""
    name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A further name (or several, one by one) that the server is called by, where it listens to
    this machine only, such as host.docker.internal; elsewhere it answers to any."""
    cors: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An origin (or several, one by one) whose web pages may ask from a browser, such as
    https://example.org; * is any."""
    rate: int = 0
    """Requests a minute for each key, or each address without one; 0 is any number."""
    queue: int = 256
    """The most replies that are being written or wait; more are refused with 429."""
    max_tokens: int = 512
    """The most tokens of a reply whose request does not say."""
    most_tokens: int = 4096
    """The most tokens of any reply, whatever its request says."""
    timeout: float = 300.0
    """Seconds that a reply may take, waiting included; then it ends where it is."""
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What the matrices are kept in: auto is bfloat16 where that is faster; int8 is smaller
    still, rounds more, and is the fastest on most processors. Experts, sliding windows, GPT-2 and
    adapters that are not merged are computed in float32, whatever is said here."""
    cache_gib: float = 0.0
    """Memory in GiB for the keys and values of what is written, of all models together; 0 is a
    quarter of the machine's, or a third of what the models leave of the GPU's. Where replies are
    long, fewer share it at a time."""
    threads: int = 0
    """Cores that the models compute on; 0 is all of them."""
    body_bytes: int = 4 << 20
    """The largest body of a request."""
    safety: bool = False
    """Stop harmful requests and replies; replies then come sentence by sentence."""
    safety_log: Path | None = None
    """Add every decision of the filter to this file, a line of JSON each, without the words."""
    votes: Literal["auto"] | Path | None = "auto"
    """Where votes on two replies side by side go, as preference pairs; None keeps none. auto is
    votes.jsonl, unless strangers can vote: then it is None."""

    def rules(self) -> Rules:
        """Who may ask, and how much; raises ``UserError`` where a value is out of range."""
        from instar.serving.app import LOOPBACK, Rules
        from instar.serving.asking import Bounds

        for name in ("queue", "max_tokens", "most_tokens", "timeout", "body_bytes"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}", "Choose a number above 0.")
        for name in ("rate", "threads", "cache_gib"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}", "Choose 0 or more; the help tells of 0.")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}", "Choose one from 0 to 65535.")
        keys = self.keys()
        if not self.local and not keys:
            print(
                f"instar: warning: everybody who reaches {self.host} can use these models. "
                "--api-key KEY keeps strangers out.",
                file=sys.stderr,
            )
        bounds = Bounds(min(self.max_tokens, self.most_tokens), self.most_tokens, self.timeout)
        for name in self.name:
            if not HOST.fullmatch(name):
                remedy = "Give the host alone, such as host.docker.internal."
                raise UserError(f"--name is {name!r}", remedy)
        hosts = (*LOOPBACK, *map(str.lower, self.name)) if self.local else ()
        return Rules(keys, self.cors, hosts, self.rate, self.body_bytes, self.queue, bounds)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def cache_bytes(self) -> int:
        """Memory for keys and values; asked when the models are loaded."""
        from instar.distributed import default_device
        from instar.machine import cache_bytes

        return int(self.cache_gib * 2**30) or cache_bytes(default_device())

    def votes_file(self, keys: Sequence[str]) -> Path | None:
        """Where votes go, if anywhere; strangers write no training data unless they are asked to.

        Args:
            keys: Keys that are accepted.
        """
        if self.votes != "auto":
            return self.votes
        return Path("votes.jsonl") if self.local or keys else None

    def keys(self) -> list[str]:
        """The keys of the command line and of the environment.

        Raises:
            UserError: One is empty, as it is where a variable is not set: that must not open the
                server to everybody.
        """
        told = os.environ.get(KEYS)
        listed = [] if told is None else told.strip().removesuffix(",").split(",")
        for source, found in (("--api-key", self.api_key), (KEYS, listed)):
            if not all(key.strip() for key in found):
                raise UserError(f"a key of {source} is empty", "Give it a key, or leave it out.")
        return [key.strip() for key in (*self.api_key, *listed)]


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: The arguments after ``instar serve``.

    Returns:
        The exit status: 0 after Ctrl-C or SIGTERM, once everything that ran is finished.

    Raises:
        UserError: A model or an option cannot be used, or a package is missing.
    """
    options = tyro.cli(Options, args=argv, prog="instar serve")
    if not options.models:
        raise UserError("no model is named", "For example: instar serve runs/mini/sft")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import torch
        import uvicorn
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}", installing("serve")) from None

    from instar.serving.app import create_app
    from instar.serving.page import mount
    from instar.serving.safety import filter_of

    rules = options.rules()
    _check_port(options.host, options.port)
    if options.threads:
        torch.set_num_threads(options.threads)
    sys.setswitchinterval(SWITCH_S)
    screen = filter_of(options.safety, options.safety_log)
    models = _opened(options)
    gc.collect()
    gc.freeze()  # or all that was imported would be searched for garbage again and again
    runs, votes = {m.name: m.directory for m in models}, options.votes_file(rules.keys)
    app = create_app(models, rules, screen, [lambda app: mount(app, runs, votes)])
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(options.timeout) + 5,
    )
    server = uvicorn.Server(config)
    # uvicorn finishes what runs, and then sends itself the signal once more: that is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run()
    gc.unfreeze()  # or libraries would complain of what is never freed
    return 0 if server.started else 1


def _opened(options: Options) -> list[Served]:
    """The models, ready to write, with memory for their keys and values."""
    from instar.serving.served import load, named, share_cache

    models = load(named(options.models), options.precision)
    for model in models:  # takes a while, for which nobody's stream should stand still
        _ = model.vocabulary
        model.engine.prepare()
    share_cache(models, options.cache_bytes())
    return models


def _check_port(host: str, port: int) -> None:
    """Raises ``UserError`` where nothing can listen, before a model was put to work."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen at {host}, port {port} ({error.strerror or error})",
                "Choose another --port or --host.",
            ) from None
