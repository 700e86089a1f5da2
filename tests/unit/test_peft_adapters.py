"""Reading PEFT adapters: what is computed with, and one line about everything else."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.adapter_files import write_adapter
from tokenmill.errors import TokenmillError
from tokenmill.models.adapters import AdapterReader, adapter_rank
from tokenmill.models.config import LayerKind, ModelConfig

CONFIG = ModelConfig(
    architecture="llama",
    name="tiny",
    vocab_size=32,
    hidden_size=8,
    layers=(LayerKind(),) * 2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rotary_dim=4,
    intermediate_size=12,
    norm_eps=1e-5,
    context_length=64,
    is_tied=True,
)
OWN = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8), "gate": (12, 8), "down": (8, 12)}
SIZES = {f"layers.{i}.{name}": size for i in range(2) for name, size in OWN.items()}
READER = AdapterReader(config=CONFIG, sizes=SIZES, max_rank=8)
MODULES = {
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.1.self_attn.q_proj": (8, 8),
    "model.layers.0.mlp.down_proj": (8, 12),
    "model.layers.1.mlp.down_proj": (8, 12),
}
TENSOR = "base_model.model.model.layers.{}.lora_{}.weight"


def test_factors_are_scaled_and_named_as_the_model_names_them(tmp_path: Path):
    adapter = READER.read("a", write_adapter(tmp_path, MODULES, rank=4, alpha=6))
    assert list(adapter.changes) == [
        *("layers.0.q", "layers.0.down", "layers.1.q", "layers.1.down"),
    ]
    assert (adapter.name, adapter.rank) == ("a", 4)
    plain = READER.read("a", write_adapter(tmp_path / "p", MODULES, rank=4, alpha=4))
    for name, change in adapter.changes.items():
        assert np.array_equal(change.down_RK, plain.changes[name].down_RK)
    assert adapter_rank(tmp_path) == 4


def test_an_adapter_of_a_model_without_a_head_names_modules_without_its_prefix(tmp_path: Path):
    bare = {module.removeprefix("model."): size for module, size in MODULES.items()}
    adapter = READER.read("a", write_adapter(tmp_path / "bare", bare))
    assert adapter.digest == READER.read("b", write_adapter(tmp_path / "whole", MODULES)).digest


def test_the_digest_is_of_the_content(tmp_path: Path):
    first = write_adapter(tmp_path / "1", MODULES, lora_dropout=0.1)
    again = write_adapter(tmp_path / "2", MODULES, revision="main")
    other = write_adapter(tmp_path / "3", MODULES, alpha=9)
    digests = [READER.read(str(i), path).digest for i, path in enumerate((first, again, other))]
    assert digests[0] == digests[1] != digests[2]


def refusal(folder: Path) -> str:
    with pytest.raises(TokenmillError) as caught:
        READER.read("a", folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("adapter a: ") or str(folder) in message
    return message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("r", "four"),
        ("lora_alpha", -1),
        ("lora_alpha", None),
        ("use_rslora", 1),
        ("rank_pattern", {"(a+)+$": 2}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", ["q_proj", "c_attn"]),
        ("layers_to_transform", ["all"]),
        ("use_something_new", True),
    ],
)
def test_a_key_that_we_do_not_compute_with_is_refused_by_name(
    tmp_path: Path, key: str, value: object
):
    message = refusal(write_adapter(tmp_path, MODULES, **{key: value}))
    assert f": {key}" in message
    shown = list(value) if isinstance(value, dict) else [value]
    assert value is None or any(repr(part) in message for part in [*shown, "c_attn", 3, 0, "x"])


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("embed_tokens", "supported are lora_A.weight and lora_B.weight of q_proj"),
        ("layers.2.self_attn.q_proj", "in layers 0 to 1"),
        ("layers.0.mlp.up_proj", "supported are"),  # this model has none
        ("layers.0.mlp.experts.3.down_proj", "supported are"),
    ],
)
def test_a_tensor_of_nothing_that_adapters_change_is_refused_by_name(
    tmp_path: Path, module: str, says: str
):
    name = f"base_model.model.model.{module}.lora_A.weight"
    folder = write_adapter(tmp_path, MODULES, tensors={name: np.zeros((4, 8), np.float32)})
    message = refusal(folder)
    assert name in message
    assert says in message


def test_a_magnitude_of_dora_is_refused(tmp_path: Path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    folder = write_adapter(tmp_path, MODULES, tensors={name: np.zeros(8, np.float32)})
    assert name in refusal(folder)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("how", ["missing", "shape", "rank", "type", "infinite"])
def test_a_tensor_that_is_wrong_is_named(tmp_path: Path, factor: str, how: str):
    name = TENSOR.format("1.mlp.down_proj", factor)
    right = (4, 12) if factor == "A" else (8, 4)
    tensor = {
        "missing": None,
        "shape": np.zeros((5, 5), np.float32),
        "rank": np.zeros((5, 12) if factor == "A" else (8, 5), np.float32),
        "type": np.zeros(right, np.int8),
        "infinite": np.full(right, np.inf, np.float32),
    }[how]
    message = refusal(write_adapter(tmp_path, MODULES, tensors={name: tensor}))
    assert name in message
    if how in ("shape", "rank"):
        assert f"expected {list(right)}" in message


def test_all_tensors_of_a_module_may_be_missing_only_where_it_is_no_target(tmp_path: Path):
    gone = {TENSOR.format("1.mlp.down_proj", factor): None for factor in "AB"}
    assert TENSOR.format("1.mlp.down_proj", "A") in refusal(
        write_adapter(tmp_path / "1", MODULES, tensors=gone)
    )
    gone |= {TENSOR.format("1.self_attn.q_proj", factor): None for factor in "AB"}
    for index, changes in enumerate(
        ({"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"target_modules": ".*_proj"})
    ):
        folder = write_adapter(tmp_path / f"some{index}", MODULES, tensors=gone, **changes)
        assert list(READER.read("a", folder).changes) == ["layers.0.q", "layers.0.down"]


def test_a_rank_beyond_the_largest_says_which_flag_to_raise(tmp_path: Path):
    message = refusal(write_adapter(tmp_path, MODULES, rank=9))
    assert "rank 9" in message
    assert "max_lora_rank is 8" in message


def test_files_that_are_no_adapter(tmp_path: Path):
    folder = write_adapter(tmp_path / "cut", MODULES)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert str(path) in refusal(folder)
    path.unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    assert "pickles" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(folder)
    for path in (tmp_path / "nowhere", Path("\0")):
        with pytest.raises(TokenmillError, match="no such folder"):
            READER.read("a", path)
    with pytest.raises(TokenmillError, match="File name too long"):
        READER.read("a", tmp_path / ("x" * 4000))


def test_an_empty_file_is_no_adapter(tmp_path: Path):
    folder = write_adapter(tmp_path, {}, target_modules=[])
    assert "holds no tensor" in refusal(folder)


def test_nulls_and_neutral_values_ask_for_nothing(tmp_path: Path):
    neutral = {"megatron_config": None, "use_qalora": False, "something_new": None, "newer": {}}
    folder = write_adapter(tmp_path, MODULES, **neutral)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["newer"] == {}
    assert READER.read("a", folder).changes
