"""What clients get for what they ask, whole and streaming."""

from tests.unit.server.running import TOKENIZER, Running, events_of

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def text_of(events):
    texts = {}
    for event in events:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def test_chat_whole_and_streaming_say_the_same(shared: Running) -> None:
    whole = shared.chat(**GREEDY).json()
    events = events_of(shared.chat(**GREEDY, stream=True))
    [choice] = whole["choices"]
    assert choice["finish_reason"] == "length"
    assert text_of(events) == {0: choice["message"]["content"]}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert "usage" not in events[0]


def test_completions_whole_and_streaming_say_the_same(shared: Running) -> None:
    ask = {**GREEDY, "prompt": ["hello", "other"], "n": 2, "seed": 5, "temperature": 1}
    whole = shared.post("/v1/completions", **ask).json()
    events = events_of(shared.post("/v1/completions", **ask, stream=True))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert text_of(events) == {c["index"]: c["text"] for c in whole["choices"]}
    assert len(set(text_of(events).values())) == 4
    assert whole["usage"]["completion_tokens"] == 32


def test_usage_counts_what_came_from_the_cache(shared: Running) -> None:
    prompt = "the same beginning, which is longer than a block or two of the cache"
    num_prompt = len(TOKENIZER.encode(prompt))
    shared.complete(prompt, **GREEDY)
    usage = shared.complete(prompt, **GREEDY).json()["usage"]
    assert usage["prompt_tokens"] == num_prompt
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == num_prompt + 8
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32
    other = shared.complete(prompt, **GREEDY, cache_salt="mine").json()["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_usage_of_a_stream_comes_last_where_it_is_wanted(shared: Running) -> None:
    for path in ("chat", "complete"):
        ask = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
        *events, last = events_of(getattr(shared, path)(**ask))
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 8
        assert all(event["usage"] is None for event in events)
    ask["stream_options"] = {"continuous_usage_stats": True}
    counts = [e["usage"]["completion_tokens"] for e in events_of(shared.complete(**ask))]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_chat_logprobs(shared: Running) -> None:
    ask = {**GREEDY, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    [choice] = shared.chat(**ask).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    for entry, token_id in zip(content, choice["token_ids"], strict=True):
        assert bytes(entry["bytes"]) == TOKENIZER.id_to_bytes(token_id)
        assert entry["logprob"] <= 0
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    events = events_of(shared.chat(**ask, stream=True))
    streamed = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for each in streamed for entry in each["content"]] == content
    assert events[0]["prompt_token_ids"]


def test_completion_logprobs_with_echo(shared: Running) -> None:
    ask = {**GREEDY, "logprobs": 2, "echo": True}
    [choice] = shared.complete("hello world", **ask).json()["choices"]
    logprobs = choice["logprobs"]
    num_tokens = len(TOKENIZER.encode("hello world")) + 8
    assert choice["text"].startswith("hello world")
    assert {len(values) for values in logprobs.values()} == {num_tokens}
    assert logprobs["token_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert "".join(logprobs["tokens"][:2]) == choice["text"][: logprobs["text_offset"][2]]
    events = events_of(shared.complete("hello world", **ask, stream=True))
    assert text_of(events) == {0: choice["text"]}
    streamed = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    for field, values in logprobs.items():
        assert [value for each in streamed for value in each[field]] == values


def test_a_prompt_can_be_scored_alone(shared: Running) -> None:
    ask = {"max_tokens": 0, "echo": True, "logprobs": 1}
    whole = shared.complete("hello world", **ask).json()
    [choice] = whole["choices"]
    assert choice["text"] == "hello world"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == 0
    assert text_of(events_of(shared.complete("hello world", **ask, stream=True))) == {
        0: "hello world"
    }


def test_prompt_logprobs(shared: Running) -> None:
    [choice] = shared.complete("hello world", **GREEDY, prompt_logprobs=1).json()["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} == set(v) for e in rest for v in e.values())
    assert shared.chat(**GREEDY, prompt_logprobs=1).json()["prompt_logprobs"][0] is None


def test_stop_strings_and_what_stopped(shared: Running) -> None:
    ask = {**GREEDY, "temperature": 1, "seed": 3, "max_tokens": 20}
    text = shared.complete(**ask).json()["choices"][0]["text"]
    stop = text[4:6]
    [choice] = shared.complete(**ask, stop=stop).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]
    ask["include_stop_str_in_output"] = True
    assert shared.complete(**ask, stop=[stop]).json()["choices"][0]["text"].endswith(stop)


def test_the_template_gets_what_it_should(shared: Running) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is "}]

    def rendered(**fields):
        tokens = shared.post("/tokenize", messages=messages, **fields).json()["tokens"]
        return shared.post("/detokenize", tokens=tokens).json()["prompt"]

    assert rendered().endswith("<|im_start|>assistant\n")
    assert rendered(add_generation_prompt=False).endswith("It is <|im_end|>\n")
    going_on = rendered(add_generation_prompt=False, continue_final_message=True)
    assert going_on.endswith("<|im_start|>assistant\nIt is ")
    assert rendered(chat_template_kwargs={"extra": "!"}).endswith("!")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert "a\nb<|im_end|>" in rendered()


def test_echo_repeats_the_message_that_is_continued(shared: Running) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is"}]
    ask = {**GREEDY, "messages": messages, "echo": True}
    ask |= {"add_generation_prompt": False, "continue_final_message": True}
    whole = shared.post("/v1/chat/completions", **ask).json()
    assert whole["choices"][0]["message"]["content"].startswith("It is")
    events = events_of(shared.post("/v1/chat/completions", **ask, stream=True))
    assert text_of(events)[0] == whole["choices"][0]["message"]["content"]


def test_prompts_are_truncated_from_the_left(shared: Running) -> None:
    ask = {**GREEDY, "return_token_ids": True, "truncate_prompt_tokens": 3}
    [choice] = shared.complete([5, 6, 7, 8, 9], **ask).json()["choices"]
    assert choice["prompt_token_ids"] == [7, 8, 9]
    for max_tokens in (8, 400):  # room for one token is enough: the answer ends when it is full
        ask |= {"truncate_prompt_tokens": -1, "max_tokens": max_tokens}
        [choice] = shared.complete([5] * 600, **ask).json()["choices"]
        assert len(choice["prompt_token_ids"]) == shared.service.llm.max_model_len - 1
        assert choice["finish_reason"] == "length"


def test_request_ids_name_the_answer(shared: Running) -> None:
    assert shared.chat(**GREEDY, request_id="mine.1").json()["id"] == "chatcmpl-mine.1"
    response = shared.client.post(
        "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "theirs"}
    )
    assert response.json()["id"] == "cmpl-theirs"
    assert response.headers["x-request-id"] == "theirs"
    insane = {"X-Request-Id": "a b\tc"}
    assert shared.client.get("/live", headers=insane).headers["x-request-id"].isalnum()


def test_models_tokens_version(shared: Running) -> None:
    names = [model["id"] for model in shared.client.get("/v1/models").json()["data"]]
    assert names == ["fake", "alias"]
    assert shared.client.get("/v1/models/alias").json()["id"] == "alias"
    assert shared.complete(model="alias", **GREEDY).json()["model"] == "alias"
    tokens = shared.post("/tokenize", prompt="hello", return_token_strs=True).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert shared.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "hello"}
    assert shared.client.get("/version").json().keys() == {"version"}


def test_the_makers_limit_of_an_answer_can_only_be_lowered() -> None:
    from tests.unit.server.running import running_server

    with running_server() as made:
        made.service.llm.loaded.generation_defaults = {"max_new_tokens": 5}
        for asked, given in ((None, 5), (3, 3), (9, 5)):
            fields = {"ignore_eos": True, "max_tokens": asked}
            for answer in (made.chat(**fields), made.complete(**fields)):
                assert answer.json()["usage"]["completion_tokens"] == given


def test_a_default_of_the_model_yields_to_the_request() -> None:
    from tests.unit.server.running import running_server

    with running_server() as made:
        made.service.llm.loaded.generation_defaults = {"temperature": 0.0}
        answers = {made.complete(max_tokens=8).json()["choices"][0]["text"] for _ in range(3)}
        assert len(answers) == 1
        answers = {
            made.complete(max_tokens=8, temperature=1).json()["choices"][0]["text"]
            for _ in range(3)
        }
        assert len(answers) == 3
