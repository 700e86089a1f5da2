"""What LoRA adapters cost: one stream, a prompt, and sixteen streams, in turns in one process.

    python benchmarks/lora.py [--rank 16] [--repeats 5]

A server without --enable-lora is the reference. The adapters are random ones for all seven linears.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tokenmill import LLM, LoRARequest, SamplingParams
from tokenmill.models.adapters import AdapterReader

PROMPT_LEN, NUM_STREAMS, NUM_TOKENS = 512, 16, 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS + 1, ignore_eos=True)
ONE = SamplingParams(temperature=0, max_tokens=1)
PROMPT = [10 + i % 1000 for i in range(PROMPT_LEN)]
SHORT = PROMPT[: PROMPT_LEN // 4]

Loras = list[LoRARequest | None]


def write_adapter(folder: Path, reader: AdapterReader, rank: int, seed: int) -> LoRARequest:
    """A random adapter for every linear that may have one."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (_, parts) in reader.modules.items():
        sizes = {"A": (rank, reader.sizes[parts[0].name][1]), "B": (parts[-1].stop, rank)}
        for factor, shape in sizes.items():
            values = 0.05 * rng.standard_normal(shape, np.float32)
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest(folder.name, 1, str(folder))


def decode_rate(llm: LLM, loras: Loras) -> float:
    """Tokens a second of one stream."""
    [output] = llm.generate([SHORT], GREEDY, lora_request=loras[:1])
    assert output.timings.first_token_s is not None
    return NUM_TOKENS / (output.timings.total_s - output.timings.first_token_s)


def prefill_rate(llm: LLM, loras: Loras) -> float:
    """Tokens of a prompt a second."""
    [output] = llm.generate([PROMPT], ONE, lora_request=loras[:1])
    assert output.timings.first_token_s is not None
    return PROMPT_LEN / output.timings.first_token_s


def batch_rate(llm: LLM, loras: Loras) -> float:
    """Tokens a second of all streams, their prompts included."""
    started_s = time.perf_counter()
    llm.generate([SHORT[i:] for i in range(NUM_STREAMS)], GREEDY, lora_request=loras)
    return NUM_STREAMS * (NUM_TOKENS + 1) / (time.perf_counter() - started_s)


MEASURES: dict[str, Callable[[LLM, Loras], float]] = {
    "one stream": decode_rate,
    f"prompt of {PROMPT_LEN}": prefill_rate,
    f"{NUM_STREAMS} streams": batch_rate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    plain = LLM(arguments.model, max_model_len=1024, enable_prefix_caching=False)
    adapted = LLM(
        arguments.model,
        max_model_len=1024,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=arguments.rank,
    )
    with plain, adapted, tempfile.TemporaryDirectory() as folder:
        plain.warm_up()
        adapted.warm_up()
        reader = adapted.loaded.adapter_reader
        assert reader is not None
        four = [write_adapter(Path(folder) / f"a{i}", reader, arguments.rank, i) for i in range(4)]
        cases: dict[str, tuple[LLM, Loras]] = {
            "without --enable-lora": (plain, [None] * NUM_STREAMS),
            "no adapter": (adapted, [None] * NUM_STREAMS),
            f"one of rank {arguments.rank}": (adapted, [four[0]] * NUM_STREAMS),
            f"four of rank {arguments.rank}": (adapted, [*four] * (NUM_STREAMS // 4)),
        }
        report(cases, arguments.repeats)


def report(cases: dict[str, tuple[LLM, Loras]], repeats: int) -> None:
    """Medians, in turns so that a busy minute hits all alike; the first turn warms up."""
    for what, measure in MEASURES.items():
        found: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(repeats + 1):
            for name, (llm, loras) in cases.items():
                rate = measure(llm, loras)
                if turn:
                    found[name].append(rate)
        reference = statistics.median(found["without --enable-lora"])
        for name, rates in found.items():
            median = statistics.median(rates)
            spread = f"{min(rates):.0f} to {max(rates):.0f}"
            print(f"{what:15} {name:22} {median:7.1f} tok/s ({spread}), {median / reference:.2f}")


if __name__ == "__main__":
    main()
