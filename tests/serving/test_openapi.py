"""Requests made from the API's own description, good ones and bad ones, by schemathesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from instar.serving.app import Rules, create_app
from instar.serving.asking import Bounds
from instar.serving.page import mount
from instar.serving.served import Served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ENDPOINTS = [
    ("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"), ("/tokenize", "POST"), ("/detokenize", "POST"),
    ("/health", "GET"), ("/metrics", "GET"), ("/chat", "POST"), ("/votes", "POST"),
]  # fmt: skip

JSON = {"Content-Type": "application/json"}
NO_NUMBER = b"""{"messages": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c",
    "sampling": {"temperature": NaN}}"""


@pytest.fixture(scope="module")
def described(
    models: list[Served],
    running: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A server that writes a few tokens at most, and what it says of itself."""
    rules = Rules(bounds=Bounds(usual_tokens=3, most_tokens=6))
    votes = tmp_path_factory.mktemp("votes") / "votes.jsonl"
    page = [lambda app: mount(app, {}, votes)]
    with running(create_app(models, rules, parts=page)) as server:
        yield schemathesis.openapi.from_url(server.url + "/openapi.json"), server


def try_out(described: Any, path: str, method: str, cases: int) -> None:
    """Half of the cases as the description allows them, half as it does not.

    What has no body cannot be asked in a wrong way.
    """
    schema, server = described
    modes = list(schemathesis.GenerationMode)
    for mode in modes if method == "POST" else modes[:1]:

        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=cases // 2 if method == "POST" else cases,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        def test(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        test()
    assert server.state.worker.open == 0
    assert all(engine.idle for engine in server.state.worker.engines)


def test_every_endpoint_is_tried(described: Any) -> None:
    paths = described[0].raw_schema["paths"]
    found = {(path, method.upper()) for path, methods in paths.items() for method in methods}
    assert found == set(ENDPOINTS)


def test_every_refusal_is_described(described: Any) -> None:
    for methods in described[0].raw_schema["paths"].values():
        for operation in methods.values():
            assert {"400", "401", "403", "413", "429"} <= set(operation["responses"])
            assert operation["description"]


def test_a_vote_is_described_as_it_is_taken(described: Any) -> None:
    schema, server = described
    fields = schema.raw_schema["components"]["schemas"]["Vote"]["properties"]
    assert all(field["description"] for field in fields.values())
    answer = httpx.post(server.url + "/votes", content=NO_NUMBER, headers=JSON)
    assert answer.status_code == 400, "JSON has no NaN, and the file is read as JSON"


@pytest.mark.parametrize(("path", "method"), ENDPOINTS)
def test_no_fault_and_no_surprise(described: Any, path: str, method: str) -> None:
    try_out(described, path, method, 30)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), ENDPOINTS)
def test_no_fault_and_no_surprise_in_a_thousand_cases(
    described: Any, path: str, method: str
) -> None:
    try_out(described, path, method, 1000)
