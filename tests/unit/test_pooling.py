"""From hidden states to embeddings, and what a model's files say of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tokenmill.config import EngineConfig
from tokenmill.engine.embedder import Embedder
from tokenmill.engine.embedding import Pairs
from tokenmill.engine.pooling import Pool, cosine, normalized, shaped, sigmoid
from tokenmill.errors import ModelFileError, TokenmillError, UnsupportedModelError, UsageError
from tokenmill.models.sentence_transformers import Pooling, read_pooling
from tokenmill.sampling.pooling import POOLINGS, PoolingParams

MEAN = PoolingParams(pooling="mean")
DECODER = SimpleNamespace(encoder=None)
ENCODER = SimpleNamespace(encoder=SimpleNamespace(num_labels=0), hidden_size=6)


def pooled(params: PoolingParams, states: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The embedding of states that come in chunks which end at `cuts`."""
    pool = Pool(params=params, span=params.span(len(states)))
    start = 0
    for stop in (*sorted(cuts), len(states)):
        first, count = pool.wanted(start, stop)
        pool.num_planned = stop
        pool.add(states[first : first + count])
        start = stop
    assert pool.next_wanted is None
    return shaped(pool.pooled(), params)


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(1, 19))
def test_bits_do_not_depend_on_chunks(length: int, cuts: list[int], size: int) -> None:
    states = np.random.default_rng(length).standard_normal((length, size), np.float32) * 1e3
    cuts = [cut for cut in cuts if cut <= length]
    for pooling in POOLINGS:
        params = PoolingParams(pooling=pooling)
        assert np.array_equal(pooled(params, states, cuts), pooled(params, states, []))


def test_what_is_pooled() -> None:
    states = np.array([[3, 4], [1, 0], [5, 12]], np.float32)
    plain = {"normalize": False}
    assert pooled(PoolingParams(pooling="last"), states, []).tolist() == pytest.approx(
        [5 / 13, 12 / 13]
    )
    assert pooled(PoolingParams(pooling="cls", **plain), states, [1]).tolist() == [3, 4]
    assert pooled(PoolingParams(pooling="mean", **plain), states, [2]).tolist() == pytest.approx(
        [3, 16 / 3]
    )
    for pooling, wanted in (
        ("max", [5, 12]),
        ("mean_sqrt_len", [9 / 3**0.5, 16 / 3**0.5]),
        ("weightedmean", [(3 + 2 + 15) / 6, (4 + 36) / 6]),
    ):
        found = pooled(PoolingParams(pooling=pooling, **plain), states, [1])
        assert found.tolist() == pytest.approx(wanted)
    cut = pooled(PoolingParams(pooling="last", dimensions=1), states, [])
    assert cut.tolist() == [1]


def test_zeros_have_no_direction() -> None:
    zeros = np.zeros(5, np.float32)
    assert normalized(zeros).tolist() == [0] * 5
    assert cosine(normalized(zeros), zeros) == 0


def test_sigmoid_does_not_overflow() -> None:
    assert [sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
    assert sigmoid(1.25) == pytest.approx(1 / (1 + np.exp(-1.25)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "min"}, "pooling is 'min', but must be one of last, mean, cls, max"),
        ({"dimensions": 0}, "dimensions is 0"),
        ({"dimensions": True}, "dimensions is True"),
    ],
)
def test_parameters_are_checked(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        PoolingParams(**options)


def test_pairs() -> None:
    assert Pairs.of("a", ["b", "c"]).indices == [(0, 0), (0, 1)]
    assert Pairs.of(["a", "b"], ["c", "d"]).indices == [(0, 0), (1, 1)]
    assert Pairs.of("a", ["b", "c"]).name(0, 0) == "text_1"
    assert Pairs.of("a", ["b", "c"]).name(1, 1) == "text_2[1]"
    for texts, message in (((["a", "b"], "c"), "text_1 has 2"), (("a", []), "text_2 is empty")):
        with pytest.raises(UsageError, match=message):
            Pairs.of(*texts)


def embedder(sizes: tuple[int, ...] | None = None, files=None, **config) -> Embedder:
    loaded = SimpleNamespace(
        config=SimpleNamespace(hidden_size=64, encoder=None),
        pooling=Pooling(kind="mean", normalize=False, sizes=sizes, **(files or {})),
    )
    intake = SimpleNamespace(make_pooled_request=None)  # not asked for any
    return Embedder(loaded, EngineConfig(**config), intake, 100)  # type: ignore[arg-type]


def test_who_says_how_embeddings_are_made() -> None:
    """The request, then the flags, then the files."""
    assert embedder().params() == PoolingParams(pooling="mean", normalize=False)
    flags = embedder(pooling="last", normalize=True)
    assert flags.params() == PoolingParams(pooling="last", normalize=True)
    assert flags.params(normalize=False, dimensions=5) == PoolingParams(
        pooling="last", normalize=False, dimensions=5
    )


@pytest.mark.parametrize(
    ("sizes", "wanted", "message"),
    [
        (None, 64, None),
        (None, 32, "was not made for less than its 64"),
        ((), 5, None),
        ((), 65, "at most 64"),
        ((16, 32), 16, None),
        ((16, 32), 17, "embeddings have 16, 32"),
    ],
)
def test_which_sizes_an_embedding_may_have(sizes, wanted, message) -> None:
    params = PoolingParams(dimensions=wanted)
    if message is None:
        return embedder(sizes).check(params)
    with pytest.raises(UsageError, match=f"dimensions is {wanted}, .*{message}"):
        embedder(sizes).check(params)


def test_a_prompt_is_asked_for_by_name() -> None:
    files = {"prompts": {"query": "query: ", "document": ""}, "default_prompt": "text: "}
    made = embedder(files=files)
    names = ("query", "document", "", None)
    assert [made.prefix(name) for name in names] == ["query: ", "", "", "text: "]
    with pytest.raises(UsageError, match=r"prompt_name is 'q'.* prompts are 'query', 'document'"):
        made.prefix("q")
    assert embedder().prefix(None) == ""
    with pytest.raises(UsageError, match="prompts are none"):
        embedder().prefix("query")


def folder(path: Path, **files: object) -> Path:
    """A model's folder; __ stands for a slash."""
    for name, content in {"config": {}, **files}.items():
        file = path / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return path


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{k}", "path": f"1_{k}"} for k in kinds]


def test_what_files_say_of_pooling(tmp_path: Path) -> None:
    files = folder(
        tmp_path,
        modules=modules("Transformer", "Pooling", "Normalize"),
        **{
            "1_Pooling__config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
        },
        sentence_bert_config={"max_seq_length": 256, "do_lower_case": False},
        config={"matryoshka_dimensions": [16, 32]},
    )
    assert read_pooling(files, ENCODER) == Pooling(  # type: ignore[arg-type]
        kind="mean", normalize=True, sizes=(16, 32), max_length=256, is_declared=True
    )


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_names_of_poolings(tmp_path: Path, config: dict[str, object], kind: str) -> None:
    files = folder(tmp_path, modules=modules("Pooling"), **{"1_Pooling__config": config})
    assert read_pooling(files, ENCODER).kind == kind  # type: ignore[arg-type]


def test_linears_follow_one_another(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(size, np.float32) for size in ((9, 6), (9,), (4, 9))]
    listed = [
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
        {"type": "sentence_transformers.models.Dropout", "path": "3_Dropout"},
        {"type": "sentence_transformers.models.Dense", "path": "4_Dense"},
    ]
    files = folder(
        tmp_path,
        modules=listed,
        **{
            "1_Pooling__config": {"pooling_mode": "mean"},
            "2_Dense__config": {"out_features": 9},
            "4_Dense__config": {
                "in_features": 9,
                "out_features": 4,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        },
    )
    first = {"linear.weight": weights[0], "linear.bias": weights[1]}
    save_file(first, files / "2_Dense" / "model.safetensors")
    save_file({"linear.weight": weights[2]}, files / "4_Dense" / "model.safetensors")
    pooling = read_pooling(files, ENCODER)  # type: ignore[arg-type]
    x = rng.standard_normal(6, np.float32)
    assert [dense.size for dense in pooling.dense] == [9, 4]
    found = pooling.dense[1](pooling.dense[0](x))
    assert np.allclose(found, weights[2] @ np.tanh(weights[0] @ x + weights[1]), atol=1e-6)
    (files / "2_Dense" / "model.safetensors").rename(files / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="has pickled weights only"):
        read_pooling(files, ENCODER)  # type: ignore[arg-type]
    save_file({"linear.weight": weights[1]}, files / "4_Dense" / "model.safetensors")
    save_file({"linear.weight": weights[0].T.copy()}, files / "2_Dense" / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"linear.bias|shape \[6, 9\]"):
        read_pooling(files, ENCODER)  # type: ignore[arg-type]


def test_without_files_an_encoder_gives_its_first_token_and_a_decoder_its_last(
    tmp_path: Path,
) -> None:
    folder(tmp_path, config={"is_matryoshka": True})
    assert read_pooling(tmp_path, ENCODER) == Pooling(kind="cls", sizes=())  # type: ignore[arg-type]
    assert read_pooling(tmp_path, DECODER) == Pooling(kind="last", sizes=())  # type: ignore[arg-type]
    metadata = {"general.architecture": "qwen3", "qwen3.pooling_type": 1}
    assert read_pooling(tmp_path / "m.gguf", DECODER, metadata) == Pooling(  # type: ignore[arg-type]
        kind="mean", is_declared=True
    )


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"modules": modules("LSTM")}, UnsupportedModelError, "type is 'LSTM', supported are"),
        (
            {"modules": modules("Pooling", "Normalize", "Dense")},
            UnsupportedModelError,
            "modules are Pooling, Normalize, Dense, supported is one pooling, in the order",
        ),
        (
            {"modules": modules("Dense"), "1_Dense__config": {"in_features": 5}},
            UnsupportedModelError,
            "in_features is 5, supported is 6",
        ),
        (
            {
                "modules": modules("Dense"),
                "1_Dense__config": {"out_features": 5, "activation_function": "torch.nn.Softmax"},
            },
            UnsupportedModelError,
            "activation_function is 'torch.nn.Softmax'",
        ),
        (
            {"modules": modules("Dense"), "1_Dense__config": {"out_features": 5}},
            ModelFileError,
            "1_Dense: has no model.safetensors",
        ),
        (
            {"modules": [], "config_sentence_transformers": {"prompts": {"query": 1}}},
            ModelFileError,
            "expected an object of texts",
        ),
        (
            {"modules": [], "config_sentence_transformers": {"default_prompt_name": "q"}},
            ModelFileError,
            "default_prompt_name is 'q', expected one of none",
        ),
        (
            {
                "modules": modules("Pooling"),
                "1_Pooling__config": {"pooling_mode": "mean", "include_prompt": False},
                "config_sentence_transformers": {"prompts": {"query": "q: "}},
            },
            UnsupportedModelError,
            "include_prompt is False",
        ),
        ({"modules": {"type": "x"}}, ModelFileError, "is no list of modules"),
        (
            {"modules": [{"type": "a.Pooling", "path": "../x"}]},
            ModelFileError,
            "lies outside the model",
        ),
        (
            {"modules": modules("Pooling"), "1_Pooling__config": {"pooling_mode_min_tokens": True}},
            UnsupportedModelError,
            "by pooling_mode_min_tokens, supported is one of",
        ),
        (
            {
                "modules": modules("Pooling"),
                "1_Pooling__config": {
                    "pooling_mode_cls_token": True,
                    "pooling_mode_mean_tokens": True,
                },
            },
            UnsupportedModelError,
            "by cls and mean",
        ),
        (
            {"modules": modules("Normalize"), "sentence_bert_config": {"do_lower_case": True}},
            UnsupportedModelError,
            "do_lower_case is True",
        ),
        ({"config": {"matryoshka_dimensions": [0]}}, ModelFileError, "a list of sizes"),
    ],
)
def test_what_files_may_not_say(
    tmp_path: Path, files: dict[str, object], error: type[TokenmillError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_pooling(folder(tmp_path, **files), ENCODER)  # type: ignore[arg-type]
