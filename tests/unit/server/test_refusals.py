"""What the server refuses: by name, in OpenAI's error object, with the right status."""

import json

import pytest

from tests.unit.server.running import Running

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"n": 1, "best_of": 3}, "best_of"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": 1e999}, "temperature"),
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"request_id": "a b"}, "request_id"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [1] * 600}, "prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_completion_fields(shared: Running, fields, param) -> None:
    body = json.dumps({"prompt": "hello", **fields})
    headers = {"Content-Type": "application/json"}
    error = shared.refuse(shared.client.post(COMPLETION, content=body, headers=headers))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_json": {}}, "guided_json"),
        ({"best_of": 2}, "best_of"),
        ({"prompt_cache_key": "mine"}, "prompt_cache_key"),
        ({"safety_identifier": "me"}, "safety_identifier"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token"),
    ],
)
def test_chat_fields(shared: Running, fields, param) -> None:
    error = shared.refuse(shared.post(CHAT, **{"messages": HELLO, **fields}))
    assert error["param"] == param


def test_what_asks_for_nothing_is_no_reason_to_refuse(shared: Running) -> None:
    harmless = {
        **{"tools": [], "tool_choice": "none", "functions": None, "store": False},
        **{"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}},
        **{"service_tier": "auto", "parallel_tool_calls": True, "max_tokens": 2},
    }
    assert shared.chat(**harmless).status_code == 200
    harmless |= {"best_of": None, "spaces_between_special_tokens": True, "length_penalty": 1.0}
    harmless |= {"logits_processors": [], "vllm_xargs": {}, "kv_transfer_params": {}}
    harmless |= {"mm_processor_kwargs": {}, "modalities": ["text"], "function_call": "none"}
    assert shared.chat(**harmless).status_code == 200
    assert shared.chat(best_of=2, n=2, max_tokens=1).status_code == 200
    assert shared.complete(suffix=None, best_of=1, max_tokens=2).status_code == 200
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert shared.chat(tools=tools, tool_choice="none", max_tokens=2).status_code == 200
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    ask = {"messages": [*HELLO, answer, *HELLO], "max_tokens": 2}
    assert shared.post(CHAT, **ask).status_code == 200


def test_images_are_refused_by_name(shared: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://x"}}
    error = shared.refuse(shared.post(CHAT, messages=[{"role": "user", "content": [part]}]))
    assert error["param"].startswith("messages[0].content")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"\xff\xfe{}",
        b"[" * 50_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_none(shared: Running, body) -> None:
    headers = {"Content-Type": "application/json"}
    shared.refuse(shared.client.post(COMPLETION, content=body, headers=headers))


def test_other_models_addresses_and_methods(shared: Running) -> None:
    assert shared.refuse(shared.complete(model="gpt-5"), 404)["code"] == "model_not_found"
    shared.refuse(shared.client.get("/v1/models/other"), 404)
    shared.refuse(shared.client.get("/v1/nothing"), 404)
    shared.refuse(shared.client.get("/static/"), 404)
    assert shared.client.get(COMPLETION).headers["allow"] == "POST"
    shared.refuse(shared.client.delete(COMPLETION), 405)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": ["a"] * 17}, "at most 16 items"),
        ({"stop": [""]}, "at least 1 character"),
        ({"stop": 5}, "valid string"),
        ({"prompt": ["a"] * 257}, "at most 256 items"),
        ({"prompt": [[1], []]}, "at least 1 item"),
        ({"prompt": [2**40]}, "less than or equal to"),
    ],
)
def test_the_reason_is_that_of_what_was_meant(shared: Running, fields, reason) -> None:
    assert reason in shared.refuse(shared.post(COMPLETION, **{"prompt": "a", **fields}))["message"]


def test_a_missing_content_type_is_named(shared: Running) -> None:
    error = shared.refuse(shared.client.post(COMPLETION, content=b'{"prompt": "a"}'))
    assert "Content-Type: application/json" in error["message"]


def test_cross_site_forms_are_refused(shared: Running) -> None:
    body, headers = b'{"prompt": "a"}', {"Content-Type": "text/plain"}
    shared.refuse(shared.client.post(COMPLETION, content=body, headers=headers))
