"""How far formats move the model's distribution: mean KL divergence to the float32 path.

    python benchmarks/kl.py wikitext2_valid.txt --peer-python peer/bin/python

The text is cut into windows of 512 tokens, each a fresh sequence. Every position's distribution is
scored (mean over all, and over the second half of each window as llama.cpp's own tool does); the
perplexity is that of the text's next tokens within the window. The reference has the weights of the
file, not rounded, and float32 throughout; --check compares it with transformers, and wants the
packages torch, transformers and accelerate. What formats of the weights cost, formats.py measures.
"""

import json
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import Peer, describe_machine, make_parser, model_path, open_peer, print_table

from tokenmill.backends.base import BLOCK_SIZE, CompiledModel, StepInput
from tokenmill.config import EngineConfig
from tokenmill.models.loader import LoadedModel, load_model
from tokenmill.models.sources import fetch

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
Scorer = Callable[[list[int]], F32Array]
"""[T] token ids of a fresh sequence to [T, vocab_size] logits."""

_ROWS = 64  # logits that a step gives

REFERENCE, DEFAULT, INT8, PEER = "float32 path", "default", "--activations int8", "llama.cpp"
OURS: dict[str, dict[str, str]] = {
    REFERENCE: {"quantization": "f32", "activations": "f32", "kv_cache": "f32"},
    DEFAULT: {},
    INT8: {"activations": "int8"},
}


@dataclass(kw_only=True)
class Score:
    """KL divergences and log-likelihoods of the positions scored so far, window after window."""

    divergences: list[F64Array] = field(default_factory=list)
    log_likelihoods: list[F64Array] = field(default_factory=list)

    def add(self, log_p: F64Array, p: F64Array, log_q: F64Array, tokens: list[int]) -> None:
        """Score a window: log probabilities [T, vocab_size] of the reference and the model."""
        self.divergences.append(np.einsum("tv,tv->t", p, log_p - log_q))
        self.log_likelihoods.append(log_q[np.arange(len(tokens) - 1), tokens[1:]])

    def row(self, name: str) -> list[str]:
        all_positions = np.stack(self.divergences)
        half = all_positions[:, all_positions.shape[1] // 2 :]
        error = all_positions.mean(axis=1).std(ddof=1) / math.sqrt(len(all_positions))
        perplexity = math.exp(-np.concatenate(self.log_likelihoods).mean())
        return [
            name,
            f"{all_positions.mean():.6f} +- {error:.6f}",
            f"{half.mean():.6f}",
            f"{np.quantile(all_positions, 0.99):.5f}",
            f"{perplexity:.4f}",
        ]

    @property
    def mean(self) -> float:
        return float(np.mean(self.divergences))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("text", type=Path, help="text file, UTF-8")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, up to 512")
    parser.add_argument("--check", action="store_true", help="compare float32 with transformers")
    args = parser.parse_args()
    # The peer needs a .gguf file; we score a folder of safetensors too.
    path = model_path(args.model) if args.peer_python else str(fetch(args.model).path)
    models = {name: load(path, args, settings) for name, settings in OURS.items()}
    vocab_size = models[REFERENCE].compiled.limits.vocab_size
    windows = read_windows(args.text, models[REFERENCE], args.windows, args.context)
    print(f"{describe_machine()}; {len(windows)} windows of {args.context} tokens of {args.text}")
    scorers: dict[str, Scorer] = {
        name: partial(our_logits, model.compiled) for name, model in models.items()
    }
    if args.check:
        check_reference(path, scorers[REFERENCE], windows[0])
    with open_peer(args) as peer, tempfile.TemporaryDirectory() as folder:
        if peer:
            file = Path(folder) / "logits"
            scorers[PEER] = partial(peer_logits, peer, path, args.threads, vocab_size, file)
        scores = measure(scorers, windows)
    report(scores, args)


def load(path: str, args: Namespace, settings: dict[str, str]) -> LoadedModel:
    config = EngineConfig(
        model=path,
        threads=args.threads,
        max_model_len=args.context,
        max_num_seqs=_ROWS,
        **settings,  # type: ignore[arg-type]  # strings all
    )
    return load_model(config)


def read_windows(text: Path, model: LoadedModel, windows: int, context: int) -> list[list[int]]:
    """The first windows of the text, of `context` tokens each, without special tokens."""
    count = windows * context
    beginning = text.read_text(encoding="utf-8")[: 16 * count]
    ids = model.tokenizer.encode(beginning, add_special_tokens=False)[:count]
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens, but {count} are asked for")
    return [ids[start : start + context] for start in range(0, count, context)]


def our_logits(compiled: CompiledModel, tokens: list[int]) -> F32Array:
    """Logits of a window, in steps of as many tokens as a step gives rows."""
    table = np.arange(-(-len(tokens) // BLOCK_SIZE), dtype=np.int32)[None]
    parts = []
    for start in range(0, len(tokens), _ROWS):
        chunk = np.array(tokens[start : start + _ROWS], np.int32)
        index = np.arange(len(chunk), dtype=np.int32)
        step = StepInput(
            tokens=chunk,
            positions=index + start,
            sequences=np.zeros_like(index),
            block_tables=table,
            rows=index,
            sampling=None,
            want_logits=True,
        )
        compiled.post(step)
        logits = compiled.wait().logits
        assert logits is not None
        parts.append(logits[:, : compiled.limits.vocab_size])
    return np.concatenate(parts)


def peer_logits(
    peer: Peer, path: str, threads: int, vocab_size: int, file: Path, tokens: list[int]
) -> F32Array:
    answer = peer.ask(op="logits", model=path, threads=threads, tokens=tokens, path=str(file))
    logits = np.fromfile(file, np.float32).reshape(len(tokens), answer["vocab_size"])
    return logits[:, :vocab_size]


def check_reference(path: str, scorer: Scorer, tokens: list[int]) -> None:
    """Print how far our float32 logits are from those of transformers on the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    file = Path(path)
    place = {} if file.is_dir() else {"gguf_file": file.name}
    folder = file if file.is_dir() else file.parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    actual = scorer(tokens)
    error = np.linalg.norm(actual - expected[:, : actual.shape[1]]) / np.linalg.norm(expected)
    print(f"{REFERENCE} against transformers float32: relative error of the logits {error:.2e}")
    if not error < 1e-4:
        raise SystemExit("the reference is wrong: its error must be below 1e-4")


def measure(scorers: dict[str, Scorer], windows: list[list[int]]) -> dict[str, Score]:
    scores = {name: Score() for name in scorers}
    for tokens in windows:
        log_p = log_softmax(scorers[REFERENCE](tokens))
        p = np.exp(log_p)
        for name, scorer in scorers.items():
            log_q = log_p if name == REFERENCE else log_softmax(scorer(tokens))
            scores[name].add(log_p, p, log_q, tokens)
    return scores


def log_softmax(logits: F32Array) -> F64Array:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def report(scores: dict[str, Score], args: Namespace) -> None:
    """Print the table and the two comparisons wanted. Exits 1 if one does not hold."""
    heads = ["model", "mean KL", "second half", "99 % quantile", "perplexity"]
    print_table([heads, *(score.row(name) for name, score in scores.items())])
    ours = scores[DEFAULT].mean
    wanted = []
    if scores[INT8].mean != ours:  # weights in bf16 are multiplied in bf16 in any case
        wanted.append((f"a third of {INT8}", ours / (scores[INT8].mean / 3)))
    if PEER in scores:
        wanted.append((PEER, ours / scores[PEER].mean))
    for name, ratio in wanted:
        print(f"{DEFAULT} / {name}: {ratio:.3f} (target <= 1, {'met' if ratio <= 1 else 'missed'})")
    if args.json:
        means = {name: score.mean for name, score in scores.items()}
        args.json.write_text(json.dumps({"mean_kl": means, "ratios": dict(wanted)}) + "\n")
    if any(ratio > 1 for _, ratio in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
