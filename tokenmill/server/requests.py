"""Bodies of requests: what clients may say, in OpenAI's names and in vLLM's for the rest.

A field that is not listed is refused by name. Those that other servers know and we do not have
are refused with a reason, unless their value asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenmill.server.errors import refused

MAX_SAMPLES = 128
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_TOP = 20
_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Top = Annotated[int, Field(ge=0, le=MAX_TOP)]
Name = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
LogitKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[TokenId], Field(max_length=2**20)]

_ASKS_NOTHING: tuple[object, ...] = (None, False, [], {}, "auto", "default")
_REFUSED = {
    "audio": "there is no sound",
    "chat_template": "the model's own chat template is used",
    "documents": "put documents into the messages",
    "function_call": "function calling is not supported",
    "functions": "function calling is not supported",
    "guided_choice": "constrained output is not supported",
    "guided_grammar": "constrained output is not supported",
    "guided_json": "constrained output is not supported",
    "guided_regex": "constrained output is not supported",
    "length_penalty": "there is no beam search",
    "modalities": "there is only text",
    "prediction": "predicted output is not supported",
    "reasoning_effort": "use chat_template_kwargs, if the model's template knows an effort",
    "service_tier": "there is one tier",
    "store": "completions are not stored",
    "structured_outputs": "constrained output is not supported",
    "suffix": "there is no infilling",
    "use_beam_search": "there is no beam search",
    "verbosity": "the model has no such setting",
    "web_search_options": "there is no web search",
}


class RequestBody(BaseModel):
    """What all bodies have in common: nothing unknown, and no guessing at types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    refuses: ClassVar[Mapping[str, str]] = _REFUSED

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.refuses.keys() & data.keys()
        for name in known:
            if not any(data[name] is v or data[name] == v for v in _ASKS_NOTHING):
                raise refused(name, f"{name} is not supported: {cls.refuses[name]}")
        return {key: value for key, value in data.items() if key not in known}


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(RequestBody):
    """What chats and completions have in common. `user` and `metadata` are labels of the caller's.

    Where a sampling field is missing or null, the model's generation_config.json decides.
    """

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Annotated[dict[LogitKey, Bias], Field(max_length=4096)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=256)] | None = None
    prompt_logprobs: Top | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] = 0
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: Name | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class Message(RequestBody):
    """One message; the fields that hold null stand in answers which clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Name | None = None
    refuses: ClassVar[Mapping[str, str]] = {
        "refusal": "only text is",
        "audio": "only text is",
        "function_call": "only text is",
        "annotations": "only text is",
    }


class ResponseFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    logprobs: Top | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(RequestBody):
    """`POST /tokenize`: a prompt or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None  # around a prompt; by default as the model wants it
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: TokenIds
