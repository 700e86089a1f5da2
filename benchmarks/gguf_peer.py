"""Does llama.cpp compute the same from a file that `tokenmill quantize` wrote?

    python benchmarks/gguf_peer.py --model folder-of-safetensors --peer-python peer/bin/python

Writes the model (a folder or a GGUF file) in each format, and gives each file to a fresh llama.cpp
and to tokenmill in float32: logits of the same tokens, and greedy text after a prompt, which each
side cuts into tokens with the tokenizer in the file. llama.cpp rounds activations to 8 bits, so its
logits are near ours and not the same; exits 1 where they are further away than that explains.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
from common import Peer, make_parser, print_table
from kl import log_softmax, our_logits, peer_logits

from tokenmill import LLM, SamplingParams
from tokenmill.config import EngineConfig
from tokenmill.models.encode import ENCODERS
from tokenmill.models.loader import load_model
from tokenmill.models.quantizing import quantize_model
from tokenmill.models.sources import fetch

PROMPT = (
    "The history of the steam engine begins in the first century. Early machines turned heat into "
    "motion, but only in the 18th century did Newcomen's engine (1712) do useful work: it pumped "
    "water out of mines. James Watt's separate condenser saved three quarters of the coal, and"
)
MOST_KL = 0.02
LEAST_AGREEMENT = 0.9
_ROWS = 64


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--formats", nargs="+", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--folder", type=Path, help="where the files are written; they stay there")
    parser.add_argument("--tokens", type=int, default=48, help="of greedy text")
    args = parser.parse_args()
    if not args.peer_python:
        raise SystemExit("this needs --peer-python: there is nobody to compare with")
    source = fetch(args.model).path
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        rows = [compare(source, folder / f"{name}.gguf", name, args) for name in args.formats]
    heads = ["file", "largest error", "tokens of the prompt", "mean KL", "same best token", "text"]
    print_table([heads, *(row[:-1] for row in rows)])
    if not all(row[-1] for row in rows):
        sys.exit(1)


def compare(source: Path, file: Path, name: str, args: Namespace) -> list[str]:
    """A row of the table; the last entry is "" where the two disagree."""
    made = quantize_model(source, file, name)
    options = {"model": str(file), "threads": args.threads, "max_model_len": 512}
    exact = {"activations": "f32", "kv_cache": "f32"}
    model = load_model(EngineConfig(**options, **exact, max_num_seqs=_ROWS))  # type: ignore[arg-type]
    tokens = model.tokenizer.encode(PROMPT)
    ours = our_logits(model.compiled, tokens)
    model.compiled.close()
    with LLM(**options, **exact) as llm:  # type: ignore[arg-type]
        params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
        [output] = llm.generate([PROMPT], params)
    with Peer(args.peer_python) as peer:
        vocab_size = model.compiled.limits.vocab_size
        place = file.with_suffix(".logits")
        theirs = peer_logits(peer, str(file), args.threads, vocab_size, place, tokens)
        peer.load(str(file), threads=args.threads, context=512)
        answer = peer.ask(op="say", prompt=PROMPT, max_tokens=args.tokens)
    place.unlink()
    log_p, log_q = log_softmax(ours), log_softmax(theirs)
    divergence = float(np.einsum("tv,tv->t", np.exp(log_p), log_p - log_q).mean())
    agreement = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    same = common_prefix(output.text, answer["text"])
    is_near = divergence <= MOST_KL and agreement >= LEAST_AGREEMENT
    is_cut_alike = answer["num_prompt_tokens"] == len(tokens)
    return [
        name,
        f"{made.relative_error:.2%}",
        f"{len(tokens)}, theirs {answer['num_prompt_tokens']}",
        f"{divergence:.5f}",
        f"{agreement:.0%}",
        f"{same} of {len(output.text)} characters alike",
        "ok" if is_near and is_cut_alike else "",
    ]


def common_prefix(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    main()
