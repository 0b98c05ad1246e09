"""Many clients at once: throughput, time to the first token, and memory over time.

    python benchmarks/serve.py --clients 1 8 64 --seconds 15

A server of a random model (S5 of generate.py, six million parameters) runs in a process of
its own, as `instar serve` starts it; the clients stream in this one. Every client asks again as
soon as its answer has ended. A stream stalls when it gives nothing for ten times the median time
between its pieces, and for two seconds at least. Errors and stalls make the exit status 1. Before
each turn of the server, the engine alone answers the same requests, as many at a time, on all
cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import torch
from generate import SHAPES

from instar.checkpoint import save_model
from instar.data.schema import Message
from instar.generation import Engine, Request, Sampling, Stopping
from instar.generation.reply import Reply
from instar.memory import keep_freed_memory
from instar.model import CausalLM
from instar.model.transformer import initialize
from instar.tokenizer.chat import prompt_ids
from instar.tokenizer.hf import save_tokenizer

STALL_S = 2.0
BANNED = {"3": -100, "5": -100}  # what ends a document or a turn: replies get their full length


@dataclass
class Seen:
    """What the clients of one round saw."""

    tokens: int = 0
    replies: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def write_model(directory: Path) -> None:
    """A random model with bytes for tokens."""
    config = SHAPES["S5"]
    model = CausalLM(config)
    initialize(model, config, torch.Generator().manual_seed(0))
    save_model(model, directory)
    save_tokenizer(directory, [], 512)


def start(directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A server, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "instar.cli", "serve", str(directory), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ})
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(url + "/health").status_code == 200:
                return server, port
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def alone(directory: Path, clients: int, tokens: int, seconds: float) -> float:
    """Tokens a second of the engine without a server, on the same requests."""
    engine = Engine.load(directory, "auto")
    sampling = Sampling(logit_bias={int(token): bias for token, bias in BANNED.items()})
    stopping = Stopping(engine.tokenizer.turn_end_ids, max_new_tokens=tokens)

    def ask(number: int) -> Reply:
        said: Message = {"role": "user", "content": f"Hello, this is client {number % clients}."}
        prompt = prompt_ids(engine.tokenizer, [said])
        return engine.submit(Request(prompt, sampling, stopping, (0, number, 0)))

    replies, asked, written = [ask(i) for i in range(clients)], clients, 0
    for _ in range(tokens):
        engine.step()  # warms up
    begun_s = time.perf_counter()
    while time.perf_counter() < begun_s + seconds:
        for row, reply in enumerate(replies):
            if reply.finish:
                replies[row], asked = ask(asked), asked + 1
        before = sum(len(reply.ids) for reply in replies)
        engine.step()
        written += sum(len(reply.ids) for reply in replies) - before
    return written / (time.perf_counter() - begun_s)


async def client(port: int, number: int, tokens: int, end_s: float, seen: Seen) -> None:
    """Ask, read the stream, and ask again until the time is over."""
    body = json.dumps({
        "messages": [{"role": "user", "content": f"Hello, this is client {number}."}],
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
        "logit_bias": BANNED,
    }).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < end_s:
        writer.write(head.encode() + body)
        try:
            await read(reader, seen)
        except (OSError, ValueError, KeyError, EOFError) as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            return
    writer.close()


async def read(reader: asyncio.StreamReader, seen: Seen) -> None:
    """One answer. Sockets are read by hand, since a whole HTTP library costs more than a server."""
    asked_s = at_s = time.perf_counter()
    first, done = True, False
    status = await reader.readline()
    if status.split()[1] != b"200":
        raise ValueError(status)
    while line := (await reader.readline()).rstrip():
        pass  # the other headers
    while size := int((await reader.readline()), 16):
        piece = (await reader.readexactly(size + 2)).decode()
        for line in piece.splitlines():
            done |= line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                raise ValueError(line)
            if chunk["usage"]:
                seen.tokens += chunk["usage"]["completion_tokens"]
            if not any(choice["delta"].get("content") for choice in chunk["choices"]):
                continue
            now_s = time.perf_counter()
            if first:
                seen.first_s.append(now_s - asked_s)
            else:
                seen.gaps_s.append(now_s - at_s)
            first, at_s = False, now_s
    await reader.readline()
    if not done:
        raise ValueError("the stream ended before its end")
    seen.replies += 1


async def together(port: int, clients: int, tokens: int, seconds: float) -> tuple[Seen, float]:
    """All clients side by side; what they saw, and how long it took."""
    seen, begun_s = Seen(), time.perf_counter()
    end_s = begun_s + seconds
    await asyncio.gather(*(client(port, i, tokens, end_s, seen) for i in range(clients)))
    return seen, time.perf_counter() - begun_s


def p95(values: list[float]) -> float:
    """The value that 95 of a hundred do not exceed."""
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else max(values, default=0)


def shown(seen: Seen, took_s: float, bare: float, memory_bytes: int) -> str:
    """A line of the table."""
    speed = seen.tokens / took_s
    return (
        f"{bare:8.0f} {speed:9.0f} ({speed / bare:.0%})"
        f" {1e3 * statistics.median(seen.first_s or [0]):15.0f}, {1e3 * p95(seen.first_s):6.0f}"
        f" {1e3 * statistics.median(seen.gaps_s or [0]):10.1f}, {1e3 * p95(seen.gaps_s):.1f},"
        f" {1e3 * max(seen.gaps_s, default=0):.0f} {seen.replies:8} {memory_bytes / 2**20:7.0f}"
    )


def stalled(seen: Seen) -> bool:
    """Whether a stream stood still for long."""
    usual_s = statistics.median(seen.gaps_s or [0])
    return max(seen.gaps_s, default=0) > max(STALL_S, 10 * usual_s)


def main() -> None:
    """Measure in turns, print a table, and fail on errors and stalls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="more show whether memory grows")
    options = parser.parse_args()
    failed = False
    shares: dict[int, list[float]] = {clients: [] for clients in options.clients}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_model(model)
        keep_freed_memory()  # as every command of instar does
        server, port = start(model)
        try:
            process = psutil.Process(server.pid)
            print(
                "clients    bare  tokens/s (of bare)  first token p50, p95 ms"
                "  gap p50, p95, max ms  replies    MiB"
            )
            for _, clients in itertools.product(range(options.rounds), options.clients):
                bare = alone(model, clients, options.tokens, 5)
                seen, took_s = asyncio.run(together(port, clients, options.tokens, options.seconds))
                shares[clients].append(seen.tokens / took_s / bare)
                failed |= bool(seen.errors) or stalled(seen)
                line = shown(seen, took_s, bare, process.memory_info().rss)
                print(f"{clients:7} {line}", flush=True)
                for error in sorted(set(seen.errors))[:3]:
                    print("  error:", error)
        finally:
            server.terminate()
            failed |= server.wait(60) != 0
    for clients, found in shares.items():
        print(f"{clients:7} clients: {statistics.median(found):.0%} of the engine alone")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
