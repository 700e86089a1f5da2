"""A model in llama2.c's format as a GGUF file in float32, with the vocabulary of another file.

    python benchmarks/llama2c.py stories15M.bin tinyllama.gguf stories15m.gguf

Real weights that were never rounded, small enough to try things with. The format is that of
github.com/karpathy/llama2.c, run.c (version 0); Llama 2's vocabulary comes out of any GGUF file
that has it. Heads are interleaved in both formats.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

FIELDS = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("vocabulary", type=Path, help="a .gguf file with the same vocabulary")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    head = np.fromfile(args.weights, np.int32, len(FIELDS))
    sizes = dict(zip(FIELDS, map(int, head), strict=True))
    if sizes["vocab"] < 0:
        raise SystemExit(f"{args.weights} has a head of its own, which is not read")
    writer = GGUFWriter(args.output, "llama")
    add_sizes(writer, sizes)
    copy_vocabulary(args.vocabulary, writer)
    values = np.fromfile(args.weights, np.float32, offset=head.nbytes)
    for name, tensor in tensors(values, sizes):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: GGUFWriter, sizes: dict[str, int]) -> None:
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["dim"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["hidden"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_rope_dimension_count(sizes["dim"] // sizes["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def copy_vocabulary(source: Path, writer: GGUFWriter) -> None:
    for name, field in GGUFReader(source).fields.items():
        if name.startswith("tokenizer.ggml."):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)


def tensors(values: np.ndarray, sizes: dict[str, int]) -> list[tuple[str, np.ndarray]]:
    """Names and matrices, in the order in which run.c maps them."""
    dim, hidden, layers = sizes["dim"], sizes["hidden"], sizes["layers"]
    kv_dim = dim // sizes["heads"] * sizes["kv_heads"]
    start = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal start
        start += int(np.prod(shape))
        return values[start - int(np.prod(shape)) : start].reshape(shape)

    found = [("token_embd.weight", take(sizes["vocab"], dim))]
    parts = (
        ("attn_norm", (dim,)),
        ("attn_q", (dim, dim)),
        ("attn_k", (kv_dim, dim)),
        ("attn_v", (kv_dim, dim)),
        ("attn_output", (dim, dim)),
        ("ffn_norm", (dim,)),
        ("ffn_gate", (hidden, dim)),
        ("ffn_down", (dim, hidden)),
        ("ffn_up", (hidden, dim)),
    )
    for name, shape in parts:
        each = take(layers, *shape)
        found += [(f"blk.{layer}.{name}.weight", each[layer]) for layer in range(layers)]
    return [*found, ("output_norm.weight", take(dim))]


if __name__ == "__main__":
    main()
