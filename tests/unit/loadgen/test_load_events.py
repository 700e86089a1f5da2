import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.loadgen.events import CompletionStream, EventParser, error_message, shorten

STREAM = b': hello\n\ndata: {"a":1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_wherever_the_network_cuts(cuts):
    parser, events = EventParser(), []
    places = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(places):
        events += parser.feed(STREAM[start:end])
    assert events == [b'{"a":1}', b"two\nlines", b"[DONE]"]


def receive(*documents, done=True):
    stream = CompletionStream()
    for index, document in enumerate(documents):
        stream.receive(b"data: " + json.dumps(document).encode() + b"\n\n", float(index))
    if done:
        stream.receive(b"data: [DONE]\n\n", 99.0)
    return stream


def test_a_greeting_is_no_token():
    stream = receive(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
    )
    assert stream.times_s == [1.0, 2.0]
    assert stream.texts == ["hm", "a"]
    assert stream.last_s == 3.0
    assert (stream.num_prompt_tokens, stream.num_output_tokens) == (5, 2)
    assert stream.is_finished
    assert stream.error is None


def test_token_ids_without_text_are_output():
    assert receive({"choices": [{"text": "", "token_ids": [7]}]}).times_s == [0.0]


def test_an_error_in_the_stream():
    stream = receive({"error": {"message": "out of\nspace"}}, done=False)
    assert stream.error == "the stream broke off: out of space"


@pytest.mark.parametrize("document", [[1], 3, {"choices": [1]}, {"choices": 5}, {"usage": 1}])
def test_an_event_of_another_kind(document):
    assert "no completion chunk" in receive(document).error


def test_messages_in_their_common_forms():
    assert error_message({"error": {"message": "a"}}) == "a"
    assert error_message({"error": "a"}) == "a"
    assert error_message({"detail": "a"}) == "a"
    assert len(shorten("x" * 999)) == 200
