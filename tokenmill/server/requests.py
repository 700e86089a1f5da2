"""Bodies of requests: what clients may say, in OpenAI's names and in vLLM's for the rest.

A field that is not listed is refused by name. Those that other servers know and we do not have
are refused with a reason, unless their value asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenmill.sampling.params import FLOAT_RANGES, INT_RANGES, MAX_LOGPROBS
from tokenmill.server.errors import refused

MAX_SAMPLES = 128
MAX_PROMPTS = 256
MAX_STOPS = 16
_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Top = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Name = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
LogitKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# Lists stop at what is wrong first: errors of a million items take half a minute to collect.
TokenIds = Annotated[list[TokenId], Field(max_length=2**20, fail_fast=True)]


class Refusal(NamedTuple):
    """Why a field is not supported, and the values that ask for nothing and are taken."""

    reason: str
    neutral: tuple[object, ...] = (None,)

    def allows(self, value: object) -> bool:
        return any(type(value) is type(each) and value == each for each in self.neutral)


_CONSTRAINED = Refusal("constrained output is not supported")
_ONLY_TEXT = Refusal("only text is", (None, []))
_FUNCTIONS = "function calling is not supported"
_REFUSED = {
    "audio": Refusal("there is no sound"),
    "chat_template": Refusal("the model's own chat template is used"),
    "documents": Refusal("put documents into the messages", (None, [])),
    "early_stopping": Refusal("there is no beam search", (None, False)),
    "function_call": Refusal(_FUNCTIONS, (None, "none", "auto")),
    "functions": Refusal(_FUNCTIONS, (None, [])),
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "kv_transfer_params": Refusal("there is one engine", (None, {})),
    "length_penalty": Refusal("there is no beam search", (None, 1.0, 1)),
    "logits_processors": Refusal("requests bring no code", (None, [])),
    "mm_processor_kwargs": Refusal("there is only text", (None, {})),
    "modalities": Refusal("there is only text", (None, [], ["text"])),
    "prediction": Refusal("predicted output is not supported"),
    "prompt_cache_key": Refusal("prefixes are found by content; cache_salt keeps callers apart"),
    "reasoning_effort": Refusal(
        "use chat_template_kwargs, if the model's template knows an effort"
    ),
    "safety_identifier": Refusal("requests are not screened; user is a label"),
    "service_tier": Refusal("there is one tier", (None, "auto", "default")),
    "spaces_between_special_tokens": Refusal("tokens are joined as they are", (None, True)),
    "store": Refusal("completions are not stored", (None, False)),
    "structured_outputs": _CONSTRAINED,
    "suffix": Refusal("there is no infilling", (None, "")),
    "use_beam_search": Refusal("there is no beam search", (None, False)),
    "verbosity": Refusal("the model has no such setting"),
    "vllm_xargs": Refusal("there are no such arguments", (None, {})),
    "web_search_options": Refusal("there is no web search"),
}


def _int_range(name: str) -> Any:
    least, greatest = INT_RANGES[name]
    return Field(ge=least, le=greatest)


def _float_range(name: str) -> Any:
    least, greatest = FLOAT_RANGES[name]
    return Field(ge=least, le=greatest)


class RequestBody(BaseModel):
    """What all bodies have in common: nothing unknown, and no guessing at types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    refuses: ClassVar[Mapping[str, Refusal]] = _REFUSED

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.refuses.keys() & data.keys()
        for name in known:
            if not cls.refuses[name].allows(data[name]):
                raise refused(name, f"{name} is not supported: {cls.refuses[name].reason}")
        taken: set[Any] = cls.model_fields.keys() - known
        unknown = next((key for key in data if key not in taken and key not in known), None)
        taken |= {unknown}  # one is enough for an error
        return {key: value for key, value in data.items() if key in taken}


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
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    temperature: Annotated[float, _float_range("temperature")] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, _int_range("top_k")] | None = None
    min_p: Annotated[float, _float_range("min_p")] | None = None
    repetition_penalty: Annotated[float, _float_range("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, _float_range("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _float_range("frequency_penalty")] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, _int_range("min_tokens")] | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Annotated[dict[LogitKey, Bias], Field(max_length=4096)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=256, fail_fast=True)] | None = None
    prompt_logprobs: Top | None = None
    truncate_prompt_tokens: Annotated[int, _int_range("truncate_prompt_tokens")] | None = None
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
    refuses: ClassVar[Mapping[str, Refusal]] = {
        "refusal": _ONLY_TEXT,
        "audio": _ONLY_TEXT,
        "function_call": _ONLY_TEXT,
        "annotations": _ONLY_TEXT,
    }


class ResponseFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
    )
    logprobs: Top | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(RequestBody):
    """`POST /tokenize`: a prompt or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool | None = None  # around a prompt; by default as the model wants it
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class LoadAdapterBody(RequestBody):
    """`POST /v1/load_lora_adapter`: a folder that PEFT has saved, on the server's disk."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False  # in place of one of that name


class UnloadAdapterBody(RequestBody):
    """`POST /v1/unload_lora_adapter`. The number is taken and not used: names are enough."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_int_id: int | None = None


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: TokenIds
