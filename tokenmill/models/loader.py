"""From a model's name to a compiled model: fetch, read, build the graph, compile, pack.

The slow parts (compiling, packing) are kept on disk, so that a second start only reads.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenmill.backends.base import BLOCK_SIZE, CompiledModel, StepLimits, window_blocks_for
from tokenmill.backends.llvm.lower import Options, Program
from tokenmill.backends.llvm.memory import Arena, memory_available_bytes
from tokenmill.backends.llvm.model import LlvmModel, kv_block_bytes
from tokenmill.backends.llvm.objects import ObjectCache, cache_key
from tokenmill.backends.llvm.program import CompiledProgram, Numerics, compile_program
from tokenmill.backends.llvm.target import pick_row
from tokenmill.backends.llvm.weights import PackedWeights, adapter_bytes
from tokenmill.backends.llvm.workers import num_usable_threads
from tokenmill.config import EngineConfig
from tokenmill.errors import CapacityError, UsageError
from tokenmill.fingerprint import code_fingerprint
from tokenmill.ir.graph import Graph
from tokenmill.models.adapters import TARGETS, AdapterReader
from tokenmill.models.checkpoint import Checkpoint, open_checkpoint
from tokenmill.models.config import ModelConfig
from tokenmill.models.eviction import SETTING, cache_limit_bytes, evict
from tokenmill.models.home import format_bytes, objects_dir, packed_dir
from tokenmill.models.kv_room import share_room
from tokenmill.models.progress import Progress, SilentProgress
from tokenmill.models.registry import build_graph
from tokenmill.models.safetensors import read_json
from tokenmill.models.sentence_transformers import Pooling, read_pooling
from tokenmill.models.sources import fetch
from tokenmill.models.text.chat import ChatTemplate
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.weights import LoadedWeight, load_weights, target_formats
from tokenmill.passes.add_adapters import AdapterRoom, adaptable, add_adapters
from tokenmill.passes.return_hidden import return_hidden

_NOTHING = memoryview(b"")
_KV_SHARE = 0.3
"""Part of the free memory that the KV pool takes if nobody says how much."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What the engine needs of a model."""

    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    compiled: CompiledModel
    adapter_reader: AdapterReader | None = None  # None: it takes no adapters
    generation_defaults: Mapping[str, object] = field(default_factory=dict)
    pooling: Pooling = field(default_factory=lambda: Pooling(kind="last"))


def load_model(
    options: EngineConfig, *, progress: Progress | None = None, target: StepLimits | None = None
) -> LoadedModel:
    """Load and compile a model. Raises the TokenmillError that says why it cannot be done.

    A model that is to guess for another is given the limits of that one as its `target`: it takes
    texts as long, if it can, and its KV cache holds no more of them.
    """
    progress = progress or SilentProgress()
    local = fetch(options.model, progress=progress, offline=options.offline)
    checkpoint = open_checkpoint(local.path)
    for note in checkpoint.notes:
        progress.note(note)
    tokenizer = _load_tokenizer(checkpoint, progress)
    longest = options.max_model_len or 0
    if target is not None:
        longest = target.blocks_per_sequence * BLOCK_SIZE
    config = checkpoint.config.stretched_to(longest)
    pooling = read_pooling(checkpoint.path, config, checkpoint.tokenizer_metadata)
    graph = build_graph(config)
    reader = _adapter_reader(config, graph, options)
    compiled = _compile(checkpoint, config, graph, tokenizer, options, progress, target)
    template = ChatTemplate.of(tokenizer) if tokenizer.chat_templates else None
    return LoadedModel(
        config=_shortened(config, pooling),
        tokenizer=tokenizer,
        chat_template=template,
        compiled=compiled,
        adapter_reader=reader,
        generation_defaults=_generation_defaults(checkpoint.path),
        pooling=pooling,
    )


def _shortened(config: ModelConfig, pooling: Pooling) -> ModelConfig:
    """An encoder takes no longer texts than it was trained for; a decoder generates beyond them."""
    if config.encoder is None or pooling.max_length is None:
        return config
    return replace(config, context_length=min(config.context_length, pooling.max_length))


def _generation_defaults(path: Path) -> Mapping[str, object]:
    """What a model's makers recommend for sampling; a GGUF file does not say."""
    config = path / "generation_config.json"
    return read_json(config) if config.is_file() else {}


def _adapter_reader(
    config: ModelConfig, graph: Graph, options: EngineConfig
) -> AdapterReader | None:
    if not options.enable_lora:
        return None
    if config.encoder is not None:
        raise UsageError(f"enable_lora is set, but {options.model} is an encoder, which takes none")
    sizes = adaptable(graph, TARGETS)
    return AdapterReader(config=config, sizes=sizes, max_rank=options.max_lora_rank)


def _load_tokenizer(checkpoint: Checkpoint, progress: Progress) -> Tokenizer:
    if checkpoint.tokenizer_metadata is None:
        from tokenmill.models.text.load import load_tokenizer

        return load_tokenizer(checkpoint.path)
    from tokenmill.models.gguf.tokenizer import load_gguf_tokenizer

    cache = packed_dir() / f"{checkpoint.fingerprint()}.tokenizer.json"
    return load_gguf_tokenizer(checkpoint.tokenizer_metadata, cache, progress=progress)


def _compile(
    checkpoint: Checkpoint,
    config: ModelConfig,
    graph: Graph,
    tokenizer: Tokenizer,
    options: EngineConfig,
    progress: Progress,
    target_limits: StepLimits | None,
) -> CompiledModel:
    started_ns, kept_bytes = time.time_ns(), cache_limit_bytes()
    shapes = {n: tuple(int(d) for d in t.shape) for n, t in graph.weights().items()}
    if options.enable_lora:
        room = AdapterRoom(
            slots=options.max_loras,
            rank=options.max_lora_rank,
            dtype="lora" if options.activations == "f32" else "lora16",
        )
        graph = add_adapters(graph, room, TARGETS)
    formats = target_formats(checkpoint, shapes, options.quantization)
    cache = options.kv_cache
    if cache == "auto":
        cache = "f32" if options.activations == "f32" else "bf16"
    target = Options(
        row=pick_row(),
        activations=options.activations,
        max_tokens=options.max_num_batched_tokens,
        max_rows=options.max_step_rows,
    )
    numerics = Numerics(activations=options.activations, cache=cache)
    objects = ObjectCache(objects_dir())
    program = compile_program(graph, formats, numerics, target, objects)
    _check_adapter_room(program.program, options)

    def make_pooling() -> CompiledProgram:
        return compile_program(return_hidden(graph), formats, numerics, target, objects)

    packed = PackedWeights.plan(program.program, shapes)
    weights = _packed_weights(checkpoint, shapes, packed, program, options, progress)
    _make_room(kept_bytes, started_ns, progress)
    limits = _limits(config, tokenizer, program.program, options, target_limits, progress)
    threads = _num_threads(options, progress)
    return LlvmModel(
        program,
        packed,
        weights,
        limits=limits,
        threads=threads,
        make_pooling=make_pooling if limits.has_logits else None,
    )


def _check_adapter_room(program: Program, options: EngineConfig) -> None:
    size_bytes, left = adapter_bytes(program), memory_available_bytes()
    if size_bytes > left:
        raise CapacityError(
            f"{options.max_loras} adapters of rank {options.max_lora_rank} take "
            f"{format_bytes(size_bytes)}, and {format_bytes(left)} of memory are left: lower "
            "max_loras or max_lora_rank"
        )


def _num_threads(options: EngineConfig, progress: Progress) -> int:
    usable = num_usable_threads()
    if options.threads is not None and options.threads > usable:
        progress.note(
            f"{options.threads} threads share {usable} processors, which makes each step slower: "
            f"threads of at most {usable} would not"
        )
    return options.threads or usable


def _packed_weights(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    packed: PackedWeights,
    program: CompiledProgram,
    options: EngineConfig,
    progress: Progress,
) -> Arena:
    """The weights as the program wants them: from an earlier start, or packed now."""
    store = ObjectCache(packed_dir())
    identity = (checkpoint.fingerprint(), options.quantization, packed.layout())
    key = cache_key(
        "weights",
        *identity,
        code_fingerprint("models", "models/gguf", "models/quantized", "models/architectures"),
        row=program.options.row,
    )
    arena = Arena(packed.size_bytes)
    whole = arena.buffer(0, packed.size_bytes)
    report = _RoundingReport.read(store.get(f"{key}-rounding"))
    if report and store.read_into(key, lambda size: whole if size == len(whole) else _NOTHING):
        report.tell(progress)
        return arena
    report = _RoundingReport()
    for loaded in load_weights(checkpoint, shapes, options.quantization, progress):
        packed.pack(arena, loaded.name, loaded.weight)
        report.add(loaded)
    report.tell(progress)
    store.put_stream(key, [whole])
    store.put(f"{key}-rounding", report.to_bytes())
    return arena


def _make_room(limit_bytes: int, keep_since_ns: int, progress: Progress) -> None:
    """Delete what earlier starts built and nobody has used for longest, beyond the limit."""
    if freed_bytes := evict(limit_bytes, keep_since_ns):
        progress.note(
            f"{format_bytes(freed_bytes)} of old code and packed weights were deleted: "
            f"{format_bytes(limit_bytes)} may be kept ({SETTING})"
        )


@dataclass
class _RoundingReport:
    """The largest error of each kind of requantisation."""

    worst: dict[tuple[str, str], float] = field(default_factory=dict)

    @staticmethod
    def read(data: bytes | None) -> "_RoundingReport | None":
        """The report that `to_bytes` gave, kept by an earlier start; None for None."""
        if data is None:
            return None
        rows = json.loads(data)
        return _RoundingReport({(source, target): error for source, target, error in rows})

    def to_bytes(self) -> bytes:
        rows = [[source, target, error] for (source, target), error in self.worst.items()]
        return json.dumps(rows).encode()

    def add(self, loaded: LoadedWeight) -> None:
        if loaded.relative_error > 0:
            kind = (loaded.source_encoding, loaded.weight.format)
            self.worst[kind] = max(self.worst.get(kind, 0.0), loaded.relative_error)

    def tell(self, progress: Progress) -> None:
        for (source, target), error in self.worst.items():
            progress.note(f"{source} weights became {target}: relative error up to {error:.2%}")


def _limits(
    config: ModelConfig,
    tokenizer: Tokenizer,
    program: Program,
    options: EngineConfig,
    target: StepLimits | None,
    progress: Progress,
) -> StepLimits:
    """How large a step may be, and how many blocks of KV cache there is room for."""
    length = options.max_model_len or config.context_length
    if target is not None:
        length = min(config.context_length, target.blocks_per_sequence * BLOCK_SIZE)
    if length > config.context_length:
        raise UsageError(
            f"max_model_len is {length}, but the model was made for {config.longest_context} "
            "tokens: give at most that, or leave it out"
        )
    per_sequence = -(-length // BLOCK_SIZE)
    free_bytes = max(0, memory_available_bytes() - adapter_bytes(program))
    room = options.kv_cache_memory_bytes or int(free_bytes * _KV_SHARE)
    # A model that guesses goes back now and then, further than a window may reach.
    window = config.window if target is None and config.window < length else 0

    def windows(count: int) -> int:
        tokens = options.max_num_batched_tokens
        return window_blocks_for(window, num_sequences=count, step_tokens=tokens)

    shares = share_room(
        room,
        kv_block_bytes(program),
        block_size=BLOCK_SIZE,
        blocks=per_sequence,
        sequences=options.max_num_seqs,
        windows=windows if window else None,
    )
    blocks = shares.blocks if target is None else min(shares.blocks, target.blocks)
    if config.encoder is not None:
        blocks = min(blocks, max(per_sequence, _encoder_blocks(options)))
    if blocks < per_sequence:
        progress.note(
            f"the KV cache has room for {blocks * BLOCK_SIZE} of {length} tokens: a longer "
            "sequence is refused; kv_cache_memory_bytes gives it more"
        )
    return StepLimits(
        tokens=options.max_num_batched_tokens,
        sequences=shares.sequences,
        rows=options.max_step_rows,
        blocks=blocks,
        blocks_per_sequence=min(per_sequence, blocks),
        slots=shares.sequences,
        vocab_size=min(config.vocab_size, tokenizer.vocab_size),
        window=window,
        window_blocks=shares.window_blocks,
        has_logits=config.has_head,
        is_encoder=config.encoder is not None,
        adapter_slots=options.max_loras if options.enable_lora else 0,
    )


def _encoder_blocks(options: EngineConfig) -> int:
    """Blocks that are enough for whole sequences in two steps, and one more each (`_fits`)."""
    sequences = options.max_num_seqs
    return 2 * (-(-options.max_num_batched_tokens // BLOCK_SIZE) + sequences) + sequences
