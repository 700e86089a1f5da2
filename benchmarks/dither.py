"""A model whose weights lie on no grid, out of a quantised file: what formats are measured on.

    python benchmarks/dither.py --model smollm2 smollm2-dithered.gguf

A file in 4 bits is no fair source to measure formats with: its weights lie on 16 levels a group,
which a format of the same groups finds again. Here each weight is moved by noise that is uniform
over its own rounding cell (as wide as its group's step), which is where the weight that the file
was made from may have lain; the result is written in bfloat16, as models are published. The same
seed gives the same file.
"""

from pathlib import Path

import numpy as np
from common import make_parser, model_path
from rewrite import as_bf16, dequantize, rewrite

from tokenmill.models.mapped import EncodedTensor, U8Array


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("output", type=Path, help="the .gguf file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dither(Path(model_path(args.model)), args.output, args.seed)


def dither(source: Path, target: Path, seed: int) -> None:
    """Write the model; matrices of floating-point numbers lie on no grid and are only rounded."""
    rng = np.random.default_rng(seed)

    def encode(tensor: EncodedTensor, _: str) -> U8Array:
        values, step = dequantize(tensor)
        if step is not None:
            values += step * (rng.random(values.shape, np.float32) - np.float32(0.5))
        return as_bf16(values)

    rewrite(source, target, lambda *_: "BF16", encode)


if __name__ == "__main__":
    main()
