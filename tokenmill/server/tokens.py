"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from typing import Any

from tokenmill.server.errors import ApiError, refused
from tokenmill.server.logprobs import token_text
from tokenmill.server.requests import DetokenizeBody, TokenizeBody
from tokenmill.server.service import Service


async def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    """Token ids of a prompt or a conversation. Raises ApiError or UsageError."""
    service.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        text = "prompt is missing: give either prompt or messages"
        raise ApiError(400, text, param="prompt", code="invalid_value")
    if body.prompt is not None:
        is_wanted = body.add_special_tokens is not False
        [tokens] = await service.encoder.encode(
            [body.prompt], add_special_tokens=is_wanted, is_bounded=False
        )
    else:
        tokens = await service.encoder.encode_chat(
            body.messages or (),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
            is_bounded=False,
        )
    strings = None
    if body.return_token_strs:
        tokenizer = service.llm.loaded.tokenizer
        strings = await service.encoder.apart(
            lambda: [token_text(tokenizer, token) for token in tokens], len(tokens)
        )
    return {
        "count": len(tokens),
        "max_model_len": service.llm.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }


async def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    """The text of token ids. Raises ApiError for an id outside the vocabulary."""
    service.model_name(body.model)
    tokenizer = service.llm.loaded.tokenizer
    for index, token in enumerate(body.tokens):
        if token >= tokenizer.vocab_size:
            text = f"tokens[{index}] is {token}, but ids end at {tokenizer.vocab_size - 1}"
            raise refused("tokens", text)
    text = await service.encoder.apart(
        lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), len(body.tokens)
    )
    return {"prompt": text}
