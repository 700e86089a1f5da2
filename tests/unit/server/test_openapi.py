"""Random requests against the OpenAPI document: no 5xx, and nothing that the document forbids."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.unit.server.running import Running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    unsupported_method,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/v2/rerank"),
    ("POST", "/rerank"),
    ("POST", "/v1/score"),
    ("POST", "/score"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/metrics"),
    ("GET", "/engine/stats"),
    ("GET", "/version"),
    ("GET", "/health"),
    ("GET", "/live"),
    ("GET", "/ready"),
]


def test_the_document_lists_every_operation(shared: Running) -> None:
    paths = shared.client.get("/openapi.json").json()["paths"]
    listed = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    # /engine/events has no end, so a case of it would have none: see test_limits.py.
    assert listed == {*OPERATIONS, ("GET", "/engine/events")}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_operation(shared: Running, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    operation = schema[path][method]

    @settings(
        max_examples=60 if method == "POST" else 10,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @schemathesis_given(operation)
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


def schemathesis_given(operation):
    """Valid and invalid requests of one operation."""
    from hypothesis import given
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    return given(
        st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
        )
        if operation.body or operation.path_parameters
        else operation.as_strategy()
    )
