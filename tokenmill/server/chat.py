"""`POST /v1/chat/completions`."""

import json
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tokenmill.engine.outputs import CompletionOutput, OutputDelta, RequestOutput
from tokenmill.engine.request import Request
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.server.answering import answer, name_call
from tokenmill.server.errors import refused
from tokenmill.server.logprobs import chat_logprobs, prompt_logprobs
from tokenmill.server.prompting import message_text
from tokenmill.server.requests import ChatBody, ResponseFormat
from tokenmill.server.service import Service, UsageCount, usage_of


async def complete_chat(service: Service, http: HttpRequest, body: ChatBody) -> Response:
    """The model's next message. Raises ApiError or UsageError."""
    model = service.model_name(body.model)
    call_id = f"chatcmpl-{name_call(http, body)}"
    _check(body)
    if body.max_completion_tokens is not None:
        max_tokens: int | None = body.max_completion_tokens
    else:
        max_tokens = body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = service.params(body, max_tokens=max_tokens, logprobs=top)
    service.check_count(body, 1)
    prompt = await service.encoder.encode_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        tools=body.tools,
        add_special_tokens=bool(body.add_special_tokens),
        is_bounded=body.truncate_prompt_tokens is None,
    )
    requests = await service.requests(body, [prompt], params, "messages")
    writer = ChatWriter(body, requests[0], service.llm.loaded.tokenizer, call_id, model)
    return await answer(http, service.bridge, requests, writer)


def _check(body: ChatBody) -> None:
    if body.tools and body.tool_choice != "none":
        raise refused("tools", 'tools are supported only with tool_choice "none"')
    if body.tool_choice not in (None, "none", "auto"):
        raise refused("tool_choice", 'tool_choice is supported only as "none"')
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs: true")
    check_response_format(body.response_format)


def check_response_format(response_format: ResponseFormat | None) -> None:
    """Text is the only format so far; ApiError for another."""
    if response_format is not None and response_format.type != "text":
        text = f"response_format {response_format.type!r} is not supported, only 'text'"
        raise refused("response_format", text)


class ChatWriter:
    """Answers of one chat in OpenAI's words.

    An event of a stream is put together from text prepared once, as there is one for each token.
    """

    def __init__(
        self, body: ChatBody, request: Request, tokenizer: Tokenizer, call_id: str, model: str
    ) -> None:
        options = body.stream_options
        self._body = body
        self._request = request
        self._tokenizer = tokenizer
        self._usage = UsageCount(requests=[request])
        self._head = {"id": call_id, "created": int(time.time()), "model": model}
        chunk = {"object": "chat.completion.chunk", **self._head}
        self._prefix = f"data: {json.dumps(chunk)[:-1]}, " + '"choices": ['
        self._has_usage = options is not None and options.include_usage
        self._counts_on = options is not None and options.continuous_usage_stats
        self._echo = _echoed(body)
        self._top = body.top_logprobs or 0

    def opening(self) -> str:
        """The role, of each choice."""
        events = []
        for index in range(self._body.n or 1):
            delta = {"role": "assistant", "content": self._echo}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            extra = {}
            if self._body.return_token_ids and index == 0:
                extra["prompt_token_ids"] = list(self._request.prompt_token_ids)
            events.append(self._chunk(json.dumps(choice), extra))
        return "".join(events)

    def event(self, index: int, delta: OutputDelta) -> str:
        self._usage.num_output_tokens += len(delta.token_ids)
        is_plain = not (delta.finish_reason or delta.logprobs or self._body.return_token_ids)
        if is_plain and not delta.text:
            return ""
        text = json.dumps(delta.text)
        start = f'{{"index": {delta.index}, "delta": {{"content": {text}}}, "logprobs": '
        if is_plain:
            return self._chunk(start + 'null, "finish_reason": null}')
        return self._chunk(start + self._rest(delta))

    def closing(self) -> str:
        if not self._has_usage:
            return ""
        return f'{self._prefix}], "usage": {json.dumps(self._usage.body())}}}\n\n'

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        body = {
            "object": "chat.completion",
            **self._head,
            "choices": [self._choice(sample) for sample in output.outputs],
            "usage": usage_of(outputs),
        }
        if output.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        if self._body.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return body

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if sample.logprobs is not None:
            logprobs = chat_logprobs(self._tokenizer, sample.logprobs, self._top)
        choice: dict[str, Any] = {
            "index": sample.index,
            "message": {
                "role": "assistant",
                "content": self._echo + sample.text,
                "refusal": None,
            },
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = sample.token_ids
        return choice

    def _rest(self, delta: OutputDelta) -> str:
        """A choice from its log probabilities on."""
        logprobs = None
        if delta.logprobs:
            logprobs = chat_logprobs(self._tokenizer, delta.logprobs, self._top)
        rest = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if self._body.return_token_ids:
            rest["token_ids"] = delta.token_ids  # type: ignore[assignment]
        return f"{json.dumps(logprobs)}, {json.dumps(rest)[1:]}"

    def _chunk(self, choice: str, extra: dict[str, Any] | None = None) -> str:
        more = f", {json.dumps(extra)[1:-1]}" if extra else ""
        if self._counts_on:
            more += f', "usage": {json.dumps(self._usage.body())}'
        elif self._has_usage:
            more += ', "usage": null'
        return f"{self._prefix}{choice}]{more}}}\n\n"


def _echoed(body: ChatBody) -> str:
    """With `echo`, an answer begins with the last message, if that is the model's own."""
    last = body.messages[-1]
    return message_text(last) if body.echo and last.role == "assistant" else ""
