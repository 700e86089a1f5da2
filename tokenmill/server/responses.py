"""The shapes of answers, as the OpenAPI document states them.

The server writes JSON by hand (an answer is many small events), and tests hold it to these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(ResponseBody):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(ResponseBody):
    error: ErrorDetail


class PromptTokensDetails(ResponseBody):
    cached_tokens: int


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(ResponseBody):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TopLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    content: list[ChatLogprob]
    refusal: None


class ChatMessage(ResponseBody):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseBody):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(ResponseBody):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(ResponseBody):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(ResponseBody):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(ResponseBody):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class Score(ResponseBody):
    object: Literal["score"]
    index: int
    score: float


class Scores(ResponseBody):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class RankedText(ResponseBody):
    text: str


class Ranked(ResponseBody):
    index: int
    relevance_score: float
    document: RankedText | None = None


class Reranking(ResponseBody):
    id: str
    model: str
    results: list[Ranked]
    usage: Usage


class ModelCard(ResponseBody):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    capabilities: list[Literal["completion", "embedding", "score"]]


class ModelList(ResponseBody):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(ResponseBody):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(ResponseBody):
    prompt: str


class Health(ResponseBody):
    status: Literal["ok"]


class Version(ResponseBody):
    version: str


class LiveStats(ResponseBody):
    """The engine at a moment; counters are since its start, `blocks` is run lengths of letters:
    f free, c cached, u used by one sequence, s shared by several. `last_evicted` are the blocks
    of the latest evictions, the last of all at the end."""

    time_s: float
    num_running: int
    num_waiting: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_evictions: int
    last_evicted: list[int]
    num_blocks: int
    num_used_blocks: int
    block_size: int
    blocks: str


_EVENT = {
    "type": "object",
    "description": "One server-sent event; its data is JSON, or [DONE] at the end.",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_ERROR: dict[str, Any] = {"model": ErrorResponse, "description": "OpenAI's error object"}


def answers(model: type[ResponseBody], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: the shape of success, and that of every error."""
    success: dict[str, Any] = {"model": model}
    if streams:
        success["content"] = {"text/event-stream": {"schema": _EVENT}}
    return {200: success, "4XX": _ERROR, "5XX": _ERROR}


def texts(media_type: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose answers are text."""
    schema = _EVENT if media_type == "text/event-stream" else {"type": "string"}
    success = {"content": {media_type: {"schema": schema}}}
    return {200: success, "4XX": _ERROR, "5XX": _ERROR}
