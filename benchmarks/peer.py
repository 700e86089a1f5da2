"""llama.cpp behind a pipe: runs under the peer's interpreter, which has `xllamacpp` and `numpy`.

One JSON object a line comes in on standard input, one goes out on standard output for each:

    {"op": "load", "model": path, "threads": n, "context": tokens, "slots": n, "options": {...}}
    {"op": "complete", "prompts": [[id, ...], ...], "max_tokens": n}
    {"op": "say", "prompt": text, "max_tokens": n}
    {"op": "logits", "model": path, "threads": n, "tokens": [id, ...], "path": file}
    {"op": "quantize", "type": n, "shape": [rows, columns], "source": file, "path": file,
     "importance": file or null}

All prompts of `complete` are submitted at once. `say` gives greedy `text`, and `num_prompt_tokens`.
`logits` writes [len(tokens), vocab] float32 values to `file`. `quantize` rounds float32 rows of
`source` to a type of ggml; `importance` has a float32 weight for each column. With the arguments
`first-token MODEL THREADS PROMPT` it prints one token and ends.
"""

import ctypes
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xllamacpp

Json = dict[str, Any]


def make_server(
    *, model: str, threads: int, context: int, slots: int, options: Json
) -> "xllamacpp.Server":
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx = context
    params.n_parallel = slots
    params.verbosity = 0
    for name, value in options.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    return xllamacpp.Server(params)


def complete(server: "xllamacpp.Server", prompts: list[list[int]], max_tokens: int) -> Json:
    """Timings of each prompt, as llama.cpp reports them, and the wall time of all."""
    requests = [
        {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
        }
        for prompt in prompts
    ]
    with ThreadPoolExecutor(len(prompts)) as threads:
        started_s = time.perf_counter()
        answers = list(threads.map(server.handle_completions, requests))
        wall_s = time.perf_counter() - started_s
    failed = [answer for answer in answers if "timings" not in answer]
    assert not failed, f"the peer refused a request: {failed[0]}"
    return {"wall_s": wall_s, "timings": [answer["timings"] for answer in answers]}


def say(server: "xllamacpp.Server", prompt: str, max_tokens: int) -> Json:
    """Greedy text after a prompt that llama.cpp cuts into tokens itself."""
    request = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    assert "choices" in answer, f"the peer refused a request: {answer}"
    count = answer["usage"]["prompt_tokens"]
    return {"text": answer["choices"][0]["text"], "num_prompt_tokens": count}


class _Params(ctypes.Structure):
    """Any of llama.h's parameter structures: larger than all of them, and never looked into.

    The x86-64 and AArch64 conventions return such a structure through a pointer, of which only
    the real size is written; the callee reads as much of the copy that it is given.
    """

    _fields_ = (("opaque", ctypes.c_int64 * 128),)


class _Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class RawModel:
    """A model through llama.h's C interface, with its default parameters: 512 tokens of context."""

    def __init__(self, model: str, threads: int) -> None:
        self._library = _load_library()
        lib = self._library
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            model.encode(), lib.llama_model_default_params()
        )
        assert self._model, f"the peer cannot load {model}"
        self._context = lib.llama_init_from_model(self._model, lib.llama_context_default_params())
        assert self._context, "the peer cannot make a context"
        lib.llama_set_n_threads(self._context, threads, threads)
        self.vocab_size = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self._batch = lib.llama_batch_init(lib.llama_n_ctx(self._context), 0, 1)

    def logits(self, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[len(tokens), vocab_size] logits of a fresh sequence."""
        lib, batch = self._library, self._batch
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch.num_tokens = len(tokens)
        for position, token in enumerate(tokens):
            batch.token[position] = token
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = 1
        status = lib.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode failed with {status}"
        shape = (len(tokens), self.vocab_size)
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), shape)


def quantize(
    *, type: int, shape: tuple[int, int], source: str, path: str, importance: str | None
) -> Json:
    """Write blocks of ggml; `size_bytes` of them."""
    lib = _load_library()
    rows, columns = shape
    values = np.fromfile(source, np.float32)
    assert values.size == rows * columns, (values.size, shape)
    weights = None if importance is None else np.fromfile(importance, np.float32)
    assert weights is None or weights.size == columns, "an importance for each column is wanted"
    assert weights is not None or not lib.ggml_quantize_requires_imatrix(type), type
    blocks = np.empty(rows * lib.ggml_row_size(type, columns), np.uint8)
    place = None if weights is None else weights.ctypes.data
    size_bytes = lib.ggml_quantize_chunk(
        type, values.ctypes.data, blocks.ctypes.data, 0, rows, columns, place
    )
    assert size_bytes == blocks.size, (size_bytes, blocks.size)
    blocks.tofile(path)
    return {"size_bytes": int(size_bytes)}


def _load_library() -> ctypes.CDLL:
    lib = ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_backend_init", None, ()),
        ("llama_model_default_params", _Params, ()),
        ("llama_context_default_params", _Params, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, _Params)),
        ("llama_init_from_model", pointer, (pointer, _Params)),
        ("llama_set_n_threads", None, (pointer, ctypes.c_int32, ctypes.c_int32)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
        ("llama_n_ctx", ctypes.c_uint32, (pointer,)),
        ("llama_batch_init", _Batch, (ctypes.c_int32,) * 3),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_clear", None, (pointer, ctypes.c_bool)),
        ("llama_decode", ctypes.c_int32, (pointer, _Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("ggml_row_size", ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
        ("ggml_quantize_requires_imatrix", ctypes.c_bool, (ctypes.c_int,)),
        (
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            (ctypes.c_int, pointer, pointer, *(ctypes.c_int64,) * 3, pointer),
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints must not come between the answers
    server: xllamacpp.Server | None = None
    raw: RawModel | None = None
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("op"):
            case "load":
                server = None
                server = make_server(**request)
                answer: Json = {"version": xllamacpp.__version__}
            case "complete":
                answer = complete(server, **request)
            case "say":
                answer = say(server, **request)
            case "logits":
                raw = raw or RawModel(request["model"], request["threads"])
                raw.logits(request["tokens"]).tofile(request["path"])
                answer = {"vocab_size": raw.vocab_size}
            case "quantize":
                answer = quantize(**request)
            case other:
                raise ValueError(f"unknown request {other!r}")
        print(json.dumps(answer), file=answers, flush=True)


def first_token(model: str, threads: str, prompt: str) -> None:
    server = make_server(
        model=model, threads=int(threads), context=2048, slots=1, options={"warmup": False}
    )
    request = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    answer = server.handle_completions(request)
    print(answer["choices"][0]["text"], flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["first-token"]:
        first_token(*sys.argv[2:])
    else:
        serve()
