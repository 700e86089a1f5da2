"""`tokenmill quantize`: write a model as a GGUF file, its matrices in 8 to 4 bits."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from tokenmill.cli.progress import make_progress
from tokenmill.models.encode import ENCODERS
from tokenmill.models.home import format_bytes
from tokenmill.models.quantizing import quantize_model
from tokenmill.models.sources import fetch


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="a model: alias, source, GGUF file or folder of safetensors")
    parser.add_argument("output", type=Path, help="the file to write, e.g. model-q4.gguf")
    parser.add_argument(
        "--format",
        choices=list(ENCODERS),
        default="q4",
        help="of ggml's types Q8_0, Q6_K, Q5_K, Q4_1 (q4; default), Q4_K and Q4_0; below 6 bits "
        "embedding and head stay at 8",
    )


def quantize(*, model: str, output: Path, format: str) -> None:
    """Quantise a file; print where the new one lies."""
    progress = make_progress()
    source = fetch(model, progress=progress).path
    made = quantize_model(source, output, format, progress)
    print(
        f"{made.num_rounded} matrices became {format}: relative error up to "
        f"{made.relative_error:.2%}; {format_bytes(made.source_bytes)} became "
        f"{format_bytes(made.target_bytes)}",
        file=sys.stderr,
    )
    print(output)
