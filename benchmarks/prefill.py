"""Prefill rate of one prompt: its tokens by the time to the first new one, against llama.cpp's.

    python benchmarks/prefill.py --peer-python peer/bin/python

Random prompt ids; nothing is cached between runs. The peer's time is the one that its server
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
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--activations", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--target", type=float, default=4.0, help="ratio wanted (default: 4)")
    args = parser.parse_args()
    path = model_path(args.model)
    figures = []
    with open_peer(args) as peer:
        if peer:
            peer.load(path, threads=args.threads, context=max(args.lengths) + 64)
        for activations in args.activations:
            with LLM(
                path,
                activations=activations,
                threads=args.threads,
                enable_prefix_caching=False,
            ) as llm:
                figures += [measure(llm, peer, activations, n, args) for n in args.lengths]
    report(figures, args)


def measure(llm: LLM, peer: Peer | None, activations: str, length: int, args: Namespace) -> Figure:
    """The rate for prompts of one length, in turn with the peer's."""
    vocab_size = llm.loaded.compiled.limits.vocab_size
    [prompt] = random_prompts([length], seed=length, vocab_size=vocab_size)

    def ours() -> float:
        [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        assert output.timings.first_token_s is not None
        assert llm.engine.stats().prefix_cache_hits == 0, "part of the prompt came from a cache"
        return length / output.timings.first_token_s

    def theirs() -> float:
        assert peer
        [timings] = peer.complete([prompt], 1)["timings"]
        assert timings["prompt_n"] == length, "the peer took part of the prompt from a cache"
        return float(length / timings["prompt_ms"] * 1e3)

    name = f"{Path(args.model).name}, {activations}, prefill of {length}"
    return compare(name, "tok/s", ours, theirs if peer else None, args=args, target=args.target)


if __name__ == "__main__":
    main()
