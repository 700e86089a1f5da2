"""`tokenmill run`: one prompt, one answer. Text to standard output, all else to standard error."""

import json
import sys
import time
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from tokenmill.cli import arguments
from tokenmill.cli.loading import check_text, open_llm
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.engine.adapters import LoRARequest
    from tokenmill.engine.llm import LLM
    from tokenmill.engine.outputs import RequestOutput
    from tokenmill.sampling.params import SamplingParams


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt; - reads standard input")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--chat",
        action="store_true",
        default=None,
        dest="wants_chat",
        help="put the prompt into the model's chat template (the default where there is one)",
    )
    mode.add_argument(
        "--raw", action="store_false", dest="wants_chat", help="give the prompt to it as it is"
    )
    arguments.add_lora_argument(parser)
    arguments.add_sampling_arguments(parser)
    arguments.add_engine_arguments(parser)


def run(
    *, prompt: str, system: str | None, wants_chat: bool | None, as_json: bool, **values: object
) -> None:
    """Generate text from a prompt; `wants_chat` None leaves the choice to the model."""
    started_s = time.perf_counter()
    text = _read_prompt(prompt)
    given = arguments.given_sampling(values)
    config = arguments.make_engine_config(values)
    with open_llm(config) as llm:
        load_s = time.perf_counter() - started_s
        params = llm.default_params(arguments.SAMPLING_FALLBACK, **given)
        ids = _make_prompt(llm, text, system, wants_chat)
        lora = arguments.make_lora_request(values["lora"])
        output = _stream(llm, ids, params, lora, is_quiet=as_json)
    if as_json:
        print(json.dumps(_summary(config.model, output, load_s), ensure_ascii=False))
    else:
        print(_last_line(output, load_s), file=sys.stderr)


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return check_text(prompt, "the prompt")
    try:
        return check_text(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: {error.reason}") from error


def _make_prompt(
    llm: "LLM", text: str, system: str | None, wants_chat: bool | None
) -> str | list[int]:
    """What the model is to complete: the text, or the token ids of a conversation."""
    if wants_chat is None:
        wants_chat = llm.loaded.chat_template is not None
    if wants_chat:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": check_text(system, "--system")})
        return llm.apply_chat_template(messages)
    if system is not None:
        raise UsageError("--system needs a model with a chat template, and no --raw")
    return text


def _stream(
    llm: "LLM",
    prompt: str | list[int],
    params: "SamplingParams",
    lora: "LoRARequest | None",
    *,
    is_quiet: bool,
) -> "RequestOutput":
    """Print the text as it comes, unless quiet; returns the whole."""
    output = None
    for delta in llm.stream(prompt, params, lora_request=lora):
        if delta.text and not is_quiet:
            print(delta.text, end="", flush=True)
        output = delta.output
    assert output is not None, "the last delta carries the output"
    if not is_quiet and not output.text.endswith("\n"):
        print(flush=True)
    return output


def decode_rate(output: "RequestOutput") -> float | None:
    """Tokens per second after the first one; None where there were fewer than two."""
    timings = output.timings
    if timings.first_token_s is None or output.num_output_tokens < 2:
        return None
    seconds = timings.total_s - timings.first_token_s
    return (output.num_output_tokens - 1) / seconds if seconds > 0 else None


def _summary(model: str, output: "RequestOutput", load_s: float) -> dict[str, object]:
    num_prompt, num_output = output.num_prompt_tokens, output.num_output_tokens
    return {
        "model": model,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
        "timings": {
            "load_s": load_s,
            "first_token_s": output.timings.first_token_s,
            "total_s": output.timings.total_s,
            "decode_tokens_per_s": decode_rate(output),
        },
    }


def _last_line(output: "RequestOutput", load_s: float) -> str:
    parts = [f"{output.num_prompt_tokens} tokens in, {output.num_output_tokens} out"]
    if (rate := decode_rate(output)) is not None:
        parts.append(f"{rate:.1f} tok/s")
    parts.append(f"loaded in {load_s:.2f} s")
    if output.timings.first_token_s is not None:
        parts.append(f"first token after {output.timings.first_token_s:.2f} s")
    if output.finish_reason == "length":
        parts.append("cut at the limit of tokens")
    return ", ".join(parts)
