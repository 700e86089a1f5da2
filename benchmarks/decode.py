"""Decode rate of one stream: tokens per second after the first, ours against llama.cpp's.

    python benchmarks/decode.py --peer-python peer/bin/python
    python benchmarks/decode.py --model qwen2.5-coder-1.5b --target 0.85 --peer-python ...

Greedy, end of sequence ignored, random prompt ids. The peer's rate is the one that its server
reports, which leaves its protocol out.
"""

from argparse import Namespace
from pathlib import Path

from common import (
    Figure,
    Peer,
    compare,
    make_parser,
    model_path,
    open_peer,
    random_prompts,
    report,
)

from tokenmill import LLM, SamplingParams


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--context", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default: 128)")
    parser.add_argument("--activations", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--target", type=float, default=1.8, help="ratio wanted (default: 1.8)")
    args = parser.parse_args()
    path = model_path(args.model)
    figures = []
    with open_peer(args) as peer:
        if peer:
            peer.load(path, threads=args.threads, context=args.context + args.tokens + 64)
        for activations in args.activations:
            with LLM(path, activations=activations, threads=args.threads) as llm:
                figures.append(measure(llm, peer, activations, args))
    report(figures, args)


def measure(llm: LLM, peer: Peer | None, activations: str, args: Namespace) -> Figure:
    """The rate with one kind of activations, in turn with the peer's."""
    vocab_size = llm.loaded.compiled.limits.vocab_size
    [prompt] = random_prompts([args.context], seed=1, vocab_size=vocab_size)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)

    def ours() -> float:
        [output] = llm.generate([prompt], params)
        timings = output.timings
        assert timings.first_token_s is not None
        return float((args.tokens - 1) / (timings.total_s - timings.first_token_s))

    def theirs() -> float:
        assert peer
        [timings] = peer.complete([prompt], args.tokens)["timings"]
        assert timings["predicted_n"] == args.tokens
        return float((args.tokens - 1) / timings["predicted_ms"] * 1e3)

    name = f"{Path(args.model).name}, {activations}, decode at {args.context}"
    return compare(name, "tok/s", ours, theirs if peer else None, args=args, target=args.target)


if __name__ == "__main__":
    main()
