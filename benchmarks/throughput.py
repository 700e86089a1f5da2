"""Output rate with many prompts at once, against llama.cpp's server with as many slots.

    python benchmarks/throughput.py --peer-python peer/bin/python

All prompts are submitted together; the rate is all new tokens by the time to the last of them.
Greedy, end of sequence ignored, random prompt ids of random lengths (fixed seed). The peer
batches continuously over one unified KV cache with room for all, one slot a prompt.
"""

import random
import time
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
    parser.set_defaults(repeats=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=32, help="prompt tokens (default: 32)")
    parser.add_argument("--longest", type=int, default=511, help="prompt tokens (default: 511)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens each (default: 128)")
    parser.add_argument("--activations", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--target", type=float, default=4.0, help="ratio wanted (default: 4)")
    parser.add_argument("--peer-split-kv", action="store_true", help="no unified KV for the peer")
    args = parser.parse_args()
    path = model_path(args.model)
    figures = []
    with open_peer(args) as peer:
        if peer:
            peer.load(
                path,
                threads=args.threads,
                context=args.prompts * (args.longest + args.tokens + 1),
                slots=args.prompts,
                kv_unified=not args.peer_split_kv,
                cont_batching=True,
            )
        for activations in args.activations:
            with LLM(
                path,
                activations=activations,
                threads=args.threads,
                max_num_seqs=args.prompts,
                enable_prefix_caching=False,
            ) as llm:
                figures.append(measure(llm, peer, activations, args))
    report(figures, args)


def measure(llm: LLM, peer: Peer | None, activations: str, args: Namespace) -> Figure:
    """The rate with one kind of activations, in turn with the peer's."""
    rng = random.Random(7)
    lengths = [rng.randint(args.shortest, args.longest) for _ in range(args.prompts)]
    vocab_size = llm.loaded.compiled.limits.vocab_size
    prompts = random_prompts(lengths, seed=8, vocab_size=vocab_size)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    total = args.prompts * args.tokens

    def ours() -> float:
        started_s = time.perf_counter()
        outputs = llm.generate(prompts, params)
        wall_s = time.perf_counter() - started_s
        assert sum(output.num_output_tokens for output in outputs) == total
        assert llm.engine.stats().prefix_cache_hits == 0, "parts of prompts came from a cache"
        return float(total / wall_s)

    def theirs() -> float:
        assert peer
        answer = peer.complete(prompts, args.tokens)
        assert sum(timings["predicted_n"] for timings in answer["timings"]) == total
        return float(total / answer["wall_s"])

    name = f"{Path(args.model).name}, {activations}, {args.prompts} prompts"
    ours()  # compiles kernels; a whole run of the peer takes minutes, so it warms up with less
    if peer:
        peer.complete(prompts[:2], 8)
    baseline = theirs if peer else None
    return compare(
        name, "output tok/s", ours, baseline, args=args, target=args.target, is_warm=True
    )


if __name__ == "__main__":
    main()
