"""Bodies of requests for embeddings and scores, in OpenAI's, Jina's and vLLM's names."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tokenmill.sampling.params import INT_RANGES
from tokenmill.server.requests import Name, Refusal, RequestBody, TokenIds

MAX_TEXTS = 2048
_INT32 = 2**31 - 1
_LEAST, _MOST = INT_RANGES["truncate_prompt_tokens"]

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]

_ONE_TEXT = Refusal("conversations are not embedded: give input")
_OF_NUMBERS = Refusal("embeddings are float32, in little-endian bytes", (None, "float32", "native"))
_REFUSED = {
    "activation": Refusal("scores are cosines, or go through a sigmoid", (None, True)),
    "additional_data": Refusal("there is no such data"),
    "embed_dtype": _OF_NUMBERS,
    "endianness": Refusal("bytes are little-endian", (None, "native", "little")),
    "messages": _ONE_TEXT,
    "mm_processor_kwargs": Refusal("there is only text", (None, {})),
    "softmax": Refusal("scores are cosines, or go through a sigmoid"),
    "use_activation": Refusal("scores are cosines, or go through a sigmoid", (None, True)),
}


class PooledBody(RequestBody):
    """What they have in common. Of a longer text the first `truncate_prompt_tokens` are taken."""

    model: Name | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=_LEAST, le=_MOST)] | None = None
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] = 0
    request_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,128}$")] | None = None
    user: Name | None = None
    refuses: ClassVar[Mapping[str, Refusal]] = _REFUSED


class EmbeddingBody(PooledBody):
    """`POST /v1/embeddings`. `prompt_name`: which of the model's prompts stands before texts."""

    input: (
        str
        | Texts
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    normalize: bool | None = None
    prompt_name: Annotated[str, Field(max_length=256)] | None = None
    add_special_tokens: bool | None = None


class Document(RequestBody):
    text: str
    refuses: ClassVar[Mapping[str, Refusal]] = {"image": Refusal("there is only text")}


class RerankBody(PooledBody):
    """`POST /v1/rerank`; a `top_n` of 0 is all."""

    query: str
    documents: Annotated[
        list[str | Document],
        Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True),
    ]
    top_n: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    return_documents: bool = True


class ScoreBody(PooledBody):
    """`POST /v1/score`: one text with each of many, or those of two lists in turn."""

    text_1: str | Texts
    text_2: str | Texts
