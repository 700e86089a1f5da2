"""`POST /v1/completions`."""

import json
import time
from collections.abc import Sequence
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tokenmill.engine.outputs import OutputDelta, RequestOutput, TokenLogprobs
from tokenmill.engine.request import Request
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.server.answering import answer, name_call
from tokenmill.server.chat import check_response_format
from tokenmill.server.errors import refused
from tokenmill.server.logprobs import completion_logprobs, prompt_logprobs
from tokenmill.server.requests import CompletionBody
from tokenmill.server.service import Service, UsageCount, usage_of

_DEFAULT_MAX_TOKENS = 16


async def complete(service: Service, http: HttpRequest, body: CompletionBody) -> Response:
    """What follows one prompt or several. Raises ApiError or UsageError."""
    model = service.model_name(body.model)
    call_id = f"cmpl-{name_call(http, body)}"
    check_response_format(body.response_format)
    if body.max_tokens == 0 and not body.echo:
        raise refused("max_tokens", "max_tokens is 0, which needs echo: true")
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = service.params(body, max_tokens=max(max_tokens, 1), logprobs=body.logprobs)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        update = body.model_copy(update={"prompt_logprobs": body.logprobs})
        params = service.params(update, max_tokens=max(max_tokens, 1), logprobs=body.logprobs)
    prompts = await _encoded(service, body)
    requests = await service.requests(body, prompts, params, "prompt")
    writer = CompletionWriter(body, requests, service.llm.loaded.tokenizer, call_id, model)
    return await answer(http, service.bridge, requests, writer)


async def _encoded(service: Service, body: CompletionBody) -> Sequence[list[int]]:
    """The prompts as token ids."""
    prompt = body.prompt
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = cast(Sequence[str | list[int]], [prompt] if is_one else prompt)
    service.check_count(body, len(prompts))
    if not isinstance(prompts[0], str):
        return cast(Sequence[list[int]], prompts)
    return await service.encoder.encode(
        cast(Sequence[str], prompts),
        add_special_tokens=body.add_special_tokens is not False,
        is_bounded=body.truncate_prompt_tokens is None,
    )


class CompletionWriter:
    """Answers of one call in OpenAI's words. Choice i of prompt p has the index p * n + i."""

    def __init__(
        self,
        body: CompletionBody,
        requests: Sequence[Request],
        tokenizer: Tokenizer,
        call_id: str,
        model: str,
    ) -> None:
        options = body.stream_options
        self._body = body
        self._n = body.n or 1
        self._requests = requests
        self._tokenizer = tokenizer
        self._usage = UsageCount(requests=requests)
        self._head = {
            "id": call_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._prefix = f"data: {json.dumps(self._head)[:-1]}, " + '"choices": ['
        self._has_usage = options is not None and options.include_usage
        self._counts_on = options is not None and options.continuous_usage_stats
        self._is_scoring = body.max_tokens == 0  # the token that was sampled is not wanted
        self._echoes = [self._prompt_text(i) if body.echo else "" for i in range(len(requests))]
        self._offsets: dict[int, int] = {}  # of choices that have begun: characters so far

    def opening(self) -> str:
        return ""

    def event(self, index: int, delta: OutputDelta) -> str:
        if not self._is_scoring:
            self._usage.num_output_tokens += len(delta.token_ids)
        number = index * self._n + delta.index
        is_first = number not in self._offsets
        token_ids, text, entries = self._shown(
            index, delta.text, delta.token_ids, delta.logprobs, is_first=is_first
        )
        offset = self._offsets.setdefault(number, 0)
        if not (text or delta.finish_reason or entries or self._body.return_token_ids):
            return ""
        start = f'{{"index": {number}, "text": {json.dumps(text)}, "logprobs": '
        if not (delta.finish_reason or entries or self._body.return_token_ids):
            return self._chunk(start + 'null, "finish_reason": null}')
        logprobs = self._logprobs(token_ids, entries, offset)
        if logprobs is not None:
            self._offsets[number] += sum(map(len, logprobs["tokens"]))
        rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason:
            rest |= self._ending(delta.finish_reason, delta.stop_reason)
        if self._body.return_token_ids:
            rest["token_ids"] = [] if self._is_scoring else delta.token_ids
            if is_first:
                rest["prompt_token_ids"] = list(self._requests[index].prompt_token_ids)
        return self._chunk(start + json.dumps(rest)[len('{"logprobs": ') :])

    def closing(self) -> str:
        if not self._has_usage:
            return ""
        return f'{self._prefix}], "usage": {json.dumps(self._usage.body())}}}\n\n'

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [self._choices(index, output) for index, output in enumerate(outputs)]
        return {
            **self._head,
            "choices": [choice for each in choices for choice in each],
            "usage": usage_of(outputs, discard_output=self._is_scoring),
        }

    def _choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        made = []
        for sample in output.outputs:
            token_ids, text, entries = self._shown(
                index, sample.text, sample.token_ids, sample.logprobs, is_first=True
            )
            choice: dict[str, Any] = {
                "index": index * self._n + sample.index,
                "text": text,
                "logprobs": self._logprobs(token_ids, entries, 0),
                **self._ending(sample.finish_reason, sample.stop_reason),
            }
            if self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
                entries_of_prompt = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
                choice["prompt_logprobs"] = entries_of_prompt
            if self._body.return_token_ids:
                choice["token_ids"] = [] if self._is_scoring else sample.token_ids
                choice["prompt_token_ids"] = output.prompt_token_ids
            made.append(choice)
        return made

    def _shown(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        entries: Sequence[TokenLogprobs] | None,
        *,
        is_first: bool,
    ) -> tuple[list[int], str, list[TokenLogprobs | None]]:
        """What a choice shows: with `echo`, its prompt comes first."""
        if self._is_scoring:
            text, token_ids, entries = "", [], []
        shown: list[TokenLogprobs | None] = list(entries or ())
        if not (is_first and self._body.echo):
            return token_ids, text, shown
        request = self._requests[index]
        if self._body.logprobs is not None and request.prompt_logprobs is not None:
            shown = [*request.prompt_logprobs, *shown]
            token_ids = [*request.prompt_token_ids, *token_ids]
        return token_ids, self._echoes[index] + text, shown

    def _logprobs(
        self, token_ids: list[int], entries: Sequence[TokenLogprobs | None], offset: int
    ) -> dict[str, Any] | None:
        top = self._body.logprobs
        if top is None:
            return None
        return completion_logprobs(self._tokenizer, token_ids, entries, top=top, offset=offset)

    def _ending(self, finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
        if self._is_scoring:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": finish_reason, "stop_reason": stop_reason}

    def _prompt_text(self, index: int) -> str:
        ids = self._requests[index].prompt_token_ids
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _chunk(self, choice: str) -> str:
        more = ""
        if self._counts_on:
            more = f', "usage": {json.dumps(self._usage.body())}'
        elif self._has_usage:
            more = ', "usage": null'
        return f"{self._prefix}{choice}]{more}}}\n\n"
