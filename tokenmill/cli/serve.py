"""`tokenmill serve`: load a model and serve it over HTTP, as OpenAI's API has it."""

import json
import logging
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.cli import arguments
from tokenmill.cli.loading import open_llm
from tokenmill.config import EngineConfig
from tokenmill.errors import UsageError

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM
    from tokenmill.server.config import ServerConfig

_SHOWN_LEN = 2048
"""Tokens of the sequences by which the size of the KV cache is told."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "positional_model", nargs="?", metavar="MODEL", help="the model, as with --model"
    )
    _add_server_arguments(parser)
    arguments.add_engine_arguments(parser)
    arguments.add_scheduling_arguments(parser)
    arguments.add_lora_arguments(parser)
    _add_traffic_arguments(parser)


def _add_server_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, help="port; 0: any free one (default: %(default)s)"
    )
    for flag, metavar, text in (
        (
            "--served-model-name",
            "NAME",
            "name of the model in requests; may be given several times",
        ),
        ("--api-key", "KEY", "key that clients must send; may be given several times"),
        ("--allowed-origin", "URL", "web origin that may call (CORS); may be given several times"),
    ):
        group.add_argument(
            flag, action="append", default=[], metavar=metavar, dest=_plural(flag), help=text
        )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with a key a line; the variable TOKENMILL_API_KEY holds keys, too",
    )
    for name, most, text in (
        ("--max-body-bytes", 16 * 2**20, "largest body of a request"),
        ("--max-connections", 2048, "connections at a time"),
    ):
        group.add_argument(
            name, type=int, metavar="N", default=most, help=f"{text} (default: %(default)s)"
        )
    for flag, default, text in (
        ("--body-timeout", 60.0, "time in which a request's body must arrive"),
        ("--drain-timeout", 30.0, "time for running requests after SIGTERM"),
        ("--stall-timeout", 4.0, "time without a step, though there is work, until /health fails"),
    ):
        group.add_argument(
            flag,
            type=float,
            metavar="SECONDS",
            default=default,
            help=f"{text} (default: {default:g})",
        )


def _plural(flag: str) -> str:
    return f"{flag.removeprefix('--').replace('-', '_')}s"


def _add_traffic_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("traffic")
    group.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        default=1024,
        help="requests that may wait; more are told to come back (default: %(default)s)",
    )
    group.add_argument(
        "--target-itl-ms",
        type=float,
        metavar="MS",
        default=40.0,
        help="gap between a stream's tokens that the prompts of others may cause; more answers new "
        "requests sooner (default: %(default)g)",
    )


def serve(
    *,
    positional_model: str | None,
    host: str,
    port: int,
    served_model_names: list[str],
    api_keys: list[str],
    allowed_origins: list[str],
    api_key_file: Path | None,
    max_body_bytes: int,
    max_connections: int,
    body_timeout: float,
    drain_timeout: float,
    stall_timeout: float,
    lora_modules: list[str],
    **values: object,
) -> None:
    """Serve a model until a signal ends it. What is wrong is said before the model is loaded."""
    from tokenmill.server.config import ServerConfig, gather_keys, read_lora_modules

    if positional_model is not None:
        values["model"] = positional_model
    engine_config = EngineConfig(**values)  # type: ignore[arg-type]  # it checks them itself
    config = ServerConfig(
        host=host,
        port=port,
        model_names=tuple(served_model_names) or (_name_of(engine_config.model),),
        api_keys=gather_keys(api_keys, api_key_file),
        allowed_origins=tuple(allowed_origins),
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        body_timeout_s=body_timeout,
        drain_timeout_s=drain_timeout,
        stall_timeout_s=stall_timeout,
        lora_modules=read_lora_modules(lora_modules),
    )
    if config.lora_modules and not engine_config.enable_lora:
        raise UsageError("--lora-modules needs --enable-lora")
    _serve(engine_config, config)


def _serve(engine_config: EngineConfig, config: "ServerConfig") -> None:
    from tokenmill.server import serving

    _log_to_stderr()
    bound = serving.bind(config.host, config.port)
    with bound, open_llm(engine_config) as llm:
        for name, path in config.lora_modules:
            llm.load_adapter(name, path)
        print(capacity(llm), file=sys.stderr)
        llm.warm_up()
        address = serving.address_of(bound)
        is_drained = serving.serve(
            llm,
            config,
            bound,
            on_ready=lambda: print(_greeting(address, config, llm), file=sys.stderr),
        )
    print("stopped" if is_drained else "stopped; some answers were cut off", file=sys.stderr)


def _name_of(model: str) -> str:
    """What requests call the model: a file's name without its folders, or the name as given."""
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model


def capacity(llm: "LLM") -> str:
    """In plain words, what fits into the KV cache."""
    from tokenmill.backends.base import BLOCK_SIZE

    limits = llm.loaded.compiled.limits
    if limits.is_encoder:
        return f"texts of up to {llm.max_model_len:,} tokens, {limits.tokens:,} tokens in a step"
    length = min(llm.max_model_len, _SHOWN_LEN)
    num_tokens = llm.loaded.compiled.limits.blocks * BLOCK_SIZE
    fitting = num_tokens // length
    room = f"room for {fitting:,} sequence{'s' if fitting != 1 else ''} of {length:,} tokens"
    told = f"{room} in a KV cache of {num_tokens:,}"
    if llm.draft is not None:
        told += f"; the draft model's holds {llm.draft.compiled.limits.blocks * BLOCK_SIZE:,}"
    if llm.adapters.is_enabled:
        count, rank = llm.config.max_loras, llm.config.max_lora_rank
        told += f"; {count} adapter{'s' if count != 1 else ''} of rank {rank} at a time"
    return told


def _greeting(address: str, config: "ServerConfig", llm: "LLM") -> str:
    key = ' -H "Authorization: Bearer $TOKENMILL_API_KEY"' if config.api_keys else ""
    path = "chat/completions"
    ask: dict[str, object] = {"messages": [{"role": "user", "content": "Hello"}]}
    if llm.embedder.is_cross_encoder:
        path, ask = "score", {"text_1": "Hello", "text_2": ["Hi", "Bye"]}
    elif not llm.loaded.compiled.limits.has_logits:
        path, ask = "embeddings", {"input": "Hello"}
    body = json.dumps({"model": config.model_names[0], **ask})
    return (
        f"ready: {address}\n"
        f"try:   curl {address}/v1/{path}{key} "
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


def _log_to_stderr() -> None:
    """The access log, as it is; of the libraries, only what went wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("tokenmill.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
