"""The OpenAPI document, and what schemathesis makes of it: whatever is sent, valid or not, the server does not fail."""

from __future__ import annotations

import json

import pytest
from tests.serve.conftest import KEY, Starter

from tunesmith.serve.engine import Limits

httpx = pytest.importorskip("httpx", reason="NOT TESTED: pip install httpx")
HEADERS = {"Authorization": f"Bearer {KEY}"}
EXAMPLES = 10  # a route and kind of input


@pytest.fixture(scope="module")
def document(live) -> dict:
    return httpx.get(f"{live.url}/openapi.json", headers=HEADERS).json()


def test_the_document_says_what_the_server_does(document) -> None:
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == {
        ("/health", "get"), ("/metrics", "get"), ("/v1/models", "get"), ("/v1/models/{name}", "get"),
        ("/v1/chat/completions", "post"), ("/v1/completions", "post"),
        ("/v1/adapters", "get"), ("/v1/adapters", "post"), ("/v1/adapters/{name}", "delete"),
    }  # fmt: skip
    assert "422" not in json.dumps(document) and document["security"] == [{"key": []}]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False and chat["properties"]["n"]["anyOf"][0]["maximum"] == 8


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_whatever_is_sent_the_server_does_not_fail(start: Starter, mode) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="NOT TESTED: pip install schemathesis")
    import hypothesis
    from hypothesis import HealthCheck, settings
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error

    live = start(limits=Limits(answers=8, request_seconds=20), max_new_tokens=8)
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", headers=HEADERS)
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        try:
            strategy = operation.as_strategy(generation_mode=GenerationMode(mode))
        except Exception as error:  # a route without parameters has no wrong ones
            assert mode == "negative", error
            continue

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=strategy)
        def check(case) -> None:
            body = case.body
            if mode == "positive" and isinstance(body, dict) and "messages" in body:
                body["model"] = "alpha"  # else nearly all of them ask for a model that is not there
            if mode == "positive" and isinstance(body, dict) and "prompt" in body:
                body["model"] = "alpha"
            for key in ("max_tokens", "max_completion_tokens"):
                if isinstance(body, dict) and isinstance(body.get(key), int) and body[key] > 8:
                    body[key] = 8
            response = case.call(headers=HEADERS)
            statuses.setdefault(case.operation.path, set()).add(response.status_code)
            case.validate_response(response, checks=(not_a_server_error,))

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            assert mode == "negative"
    assert live.settled() and live.engine.alive
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert statuses[path] & {200, 400}, statuses
    if mode == "positive":
        assert 200 in statuses["/v1/completions"], statuses
