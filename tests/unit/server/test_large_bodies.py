"""Large bodies do not hold up what else runs, whatever is in them."""

import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.server.running import Running, running_server
from tokenmill.server import large_bodies
from tokenmill.server.pooling_requests import EmbeddingBody
from tokenmill.server.requests import ChatBody, CompletionBody, RequestBody

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.sampled_from((None, 1)))
def test_values_are_those_of_the_standard_parser(value: Any, indent: int | None) -> None:
    body = json.dumps(value, indent=indent).encode()
    assert large_bodies.parse_yielding(body) == json.loads(body)


@pytest.mark.parametrize("body", [b"", b"[1, 2", b'{"a" 1}', b'"\x01"', b"[1] 2", b'["\xff"]'])
def test_so_are_errors(body: bytes) -> None:
    errors = []
    for parse in (json.loads, large_bodies.parse_yielding):
        with pytest.raises((json.JSONDecodeError, UnicodeDecodeError)) as caught:
            parse(body)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_others_are_served_while_a_large_body_is_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    parse = large_bodies.parse_yielding

    def held(body: bytes) -> Any:
        has_begun.set()
        assert may_go_on.wait(20)
        return parse(body)

    monkeypatch.setattr(large_bodies, "parse_yielding", held)
    answers = []
    with running_server() as made:
        texts = ["a" * 200] * 400
        thread = threading.Thread(
            target=lambda: answers.append(made.post("/v1/embeddings", input=texts))
        )
        thread.start()
        assert has_begun.wait(20)
        assert made.complete("hello", max_tokens=3).status_code == 200
        may_go_on.set()
        thread.join(20)
    assert len(answers[0].json()["data"]) == 400


def test_a_large_body_that_is_no_json_is_refused(shared: Running) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b'{"prompt": [' + b"1," * 50_000, b"[" * 70_000):
        answer = shared.client.post("/v1/completions", content=content, headers=headers)
        assert shared.refuse(answer)["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [{}] * 5000}),
        (CompletionBody, {"prompt": [["x"]] * 5000}),
        (CompletionBody, {"prompt": "a", "bad_words": [1] * 5000}),
        (CompletionBody, {"prompt": "a"} | {f"x{i}": 1 for i in range(5000)}),
        (ChatBody, {"messages": [{}] * 5000}),
        (EmbeddingBody, {"input": [{}] * 5000}),
    ],
)
def test_what_is_wrong_is_told_once(kind: type[RequestBody], body: dict[str, Any]) -> None:
    """A million errors would take half a minute to collect."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10
