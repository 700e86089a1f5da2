"""What each weight format costs: KL divergence and perplexity, against the same weights in float32.

    python benchmarks/dither.py --model smollm2 base.gguf
    python benchmarks/formats.py wikitext2_valid.txt --model base.gguf \\
        --peer-python peer/bin/python --peer-types Q8_0 Q4_K IQ3_S --importance
    python benchmarks/formats.py wikitext2_valid.txt --model folder --row GPTQ folder-gptq

A row is one set of weights, scored with float32 activations and cache (or as --activations says):

- `--formats`: what tokenmill makes of the model on load, and so what `quantize` writes;
- `--peer-types`: files that llama.cpp's own quantiser rounds, scored exactly as they are, and where
  tokenmill holds a type only as another format, as it is loaded too;
- `--row LABEL MODEL`, once or more: any other model of the same vocabulary, as it is loaded.

The text is cut into windows as kl.py does. The reference's log probabilities are kept in a file, so
that only one model is in memory at a time. `--importance` gives llama.cpp the mean squares of the
activations (importance.py), of windows behind those that are scored, for types below 4 bits; three
of them (IQ2_XXS, IQ2_XS, IQ1_S) are not to be had without.
"""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Peer, describe_machine, make_parser, model_path, open_peer
from importance import measure_importance
from kl import F32Array, Score, load, log_softmax, our_logits, read_windows
from peer_types import bits_of, has_joined_rows, write_in_type

from tokenmill.ir.formats import FORMATS
from tokenmill.models.encodings import FLOAT_ENCODINGS, QUANT_ENCODINGS
from tokenmill.models.sources import fetch

_EXACT = {"activations": "f32", "kv_cache": "f32"}
_HEADS = ["weights", "mean KL", "second half", "99 % quantile", "perplexity"]
_CALIBRATION_WINDOWS = 4
_MOST_WEIGHTED_BITS = 4.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of weights: a model, and the format that it is brought to."""

    label: str
    path: Path
    quantization: str = "auto"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("text", type=Path, help="text file, UTF-8")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, up to 512")
    parser.add_argument("--activations", choices=("f32", "bf16"), default="f32", help="of the rows")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--peer-types", nargs="*", default=[], metavar="TYPE", help="of ggml")
    parser.add_argument("--importance", action="store_true", help="for types below 4 bits")
    parser.add_argument(
        "--row", dest="rows", nargs=2, action="append", default=[], metavar=("LABEL", "MODEL")
    )
    parser.add_argument("--folder", type=Path, help="for temporary files, which may be large")
    args = parser.parse_args()
    # llama.cpp's quantiser gets the matrices of a .gguf file; we score a folder too.
    path = Path(model_path(args.model)) if args.peer_types else fetch(args.model).path
    with open_peer(args) as peer, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.peer_types and peer is None:
            raise SystemExit("--peer-types needs --peer-python")
        reference = Reference(path, args, Path(folder))
        print(f"{describe_machine()}; {args.windows} windows of {args.context} tokens", flush=True)
        print_row(_HEADS)
        print_row(["---"] * len(_HEADS))
        print_row(reference.score.row("float32 (the reference)"))
        for row in choose_rows(path, peer, args, reference, Path(folder)):
            print_row(score(row, args, reference).row(row.label))


def print_row(cells: list[str]) -> None:
    """At once: a run takes long, and may be ended before its last row."""
    print("| " + " | ".join(cells) + " |", flush=True)


class Reference:
    """Log probabilities of the model in float32, in a file; windows to score, and others."""

    def __init__(self, path: Path, args: Namespace, folder: Path) -> None:
        model = load(str(path), args, {"quantization": "f32", **_EXACT})
        count = args.windows + (_CALIBRATION_WINDOWS if args.importance else 0)
        windows = read_windows(args.text, model, count, args.context)
        self.windows, self.other_windows = windows[: args.windows], windows[args.windows :]
        shape = (args.windows, args.context, model.compiled.limits.vocab_size)
        self._log_p = np.memmap(folder / "reference", np.float32, "w+", shape=shape)
        self.score = Score()
        for index, tokens in enumerate(self.windows):
            log_p = log_softmax(our_logits(model.compiled, tokens))
            self._log_p[index] = log_p
            self.score.add(log_p, np.exp(log_p), log_p, tokens)
        model.compiled.close()

    def compare(self, index: int, logits: F32Array, score: Score) -> None:
        """Score a window of a row."""
        log_p = self._log_p[index].astype(np.float64)
        score.add(log_p, np.exp(log_p), log_softmax(logits), self.windows[index])


def choose_rows(
    path: Path, peer: Peer | None, args: Namespace, reference: Reference, folder: Path
) -> Iterator[Row]:
    """The rows one by one; a file that was made for one lies there until the next is asked for."""
    for name in args.formats:
        yield Row(label=name, path=path, quantization=name)
    for label, model in args.rows:
        yield Row(label=label, path=fetch(model).path)
    importance: dict[str, F32Array] = {}
    for name in args.peer_types:
        assert peer is not None
        made = folder / f"{name}.gguf"
        is_weighted = args.importance and bits_of(name) < _MOST_WEIGHTED_BITS
        if is_weighted and not importance:
            importance = measure_importance(path, reference.other_windows)
        write_in_type(peer, path, made, name, importance if is_weighted else {})
        is_native = name in (*QUANT_ENCODINGS, *FLOAT_ENCODINGS)
        label = f"llama.cpp {name}{', importance' if is_weighted else ''}"
        is_held = is_native and not has_joined_rows(path, name)
        yield Row(label=label, path=made, quantization="auto" if is_held else "f32")
        if not is_native:
            yield Row(label=f"{label}, held as q8", path=made, quantization="q8")
        made.unlink()


def score(row: Row, args: Namespace, reference: Reference) -> Score:
    settings = {"quantization": row.quantization, **_EXACT, "activations": args.activations}
    model = load(str(row.path), args, settings)
    found = Score()
    for index, tokens in enumerate(reference.windows):
        reference.compare(index, our_logits(model.compiled, tokens), found)
    model.compiled.close()
    return found


if __name__ == "__main__":
    main()
