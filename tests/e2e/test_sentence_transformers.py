"""Models with the files of sentence-transformers, against what that library does, in torch.

Where the library is installed, it is the reference itself.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from tests.e2e.test_bare_checkpoints import F32, SIZES, prompts, random_model
from tests.unit.tiny_tokenizers import write_folder
from tokenmill import LLM
from tokenmill.errors import UsageError

TEXTS = ["hello world", "what is it?", "so it goes, on and on " * 3, "es"]
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
LINEARS = (("2_Dense", 48, 90, "linear.Identity"), ("3_Dense", 90, 40, "activation.Tanh"))
GEMMA = SIZES | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "use_bidirectional_attention": True,
    "bos_token_id": 1,
}


def write_modules(folder: Path, pooling: dict[str, object], default: str | None) -> None:
    """The files of EmbeddingGemma: pooling, two linears, a norm, and prompts."""
    contents: dict[str, object] = {
        "1_Pooling/config.json": {"word_embedding_dimension": 48, **pooling},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": default},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
    }
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for name, num_inputs, size, activation in LINEARS:
        contents[f"{name}/config.json"] = {
            "in_features": num_inputs,
            "out_features": size,
            "bias": name == "3_Dense",
            "activation_function": f"torch.nn.modules.{activation}",
        }
        kinds.append((name, "Dense"))
    kinds.append(("4_Normalize", "Normalize"))
    contents["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    for path, content in contents.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    for name, tensors in linears().items():
        save_file(tensors, folder / name / "model.safetensors")
    (folder / "4_Normalize").mkdir()


def linears() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    made = {}
    for name, num_inputs, size, _ in LINEARS:
        made[name] = {"linear.weight": torch.randn(size, num_inputs) * num_inputs**-0.5}
    made["3_Dense"]["linear.bias"] = torch.randn(40)
    return made


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("gemma")
    model = random_model(transformers.Gemma3TextConfig(**GEMMA))
    model.save_pretrained(folder)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    write_modules(
        write_folder(folder, tokenizer_config=kind), {"pooling_mode_mean_tokens": True}, None
    )
    return folder, model


def embedding(model: Any, folder: Path, text: str) -> np.ndarray:
    """What sentence-transformers does."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made = linears()
    with torch.no_grad():
        states = model(torch.tensor([backend.encode(text).ids])).last_hidden_state[0]
        x = states.mean(0) @ made["2_Dense"]["linear.weight"].T
        x = torch.tanh(x @ made["3_Dense"]["linear.weight"].T + made["3_Dense"]["linear.bias"])
        return torch.nn.functional.normalize(x, dim=0).numpy()


def test_linears_prompts_and_attention_both_ways(gemma: tuple[Path, Any], caches: Path) -> None:
    folder, model = gemma
    with LLM(str(folder), **F32) as llm:
        assert llm.max_model_len == 128
        plain = [o.outputs.embedding for o in llm.embed(TEXTS)]
        queries = [o.outputs.embedding for o in llm.embed(TEXTS, prompt_name="query")]
        scores = [s.outputs.score for s in llm.score(TEXTS[0], TEXTS)]
        with pytest.raises(
            UsageError, match=r"prompt_name is 'nonsense'.* are 'query', 'document'"
        ):
            llm.embed(TEXTS, prompt_name="nonsense")
        with pytest.raises(UsageError, match="encoder, which generates no text"):
            llm.generate("hi")
        with pytest.raises(UsageError, match="was not made for less than its 40"):
            llm.embed("hi", pooling_params=llm.embedder.params(dimensions=8))
    wanted = [embedding(model, folder, text) for text in TEXTS]
    for a, b in zip(plain, wanted, strict=True):
        assert a.shape == (40,)
        assert np.abs(a - b).max() < 1e-5
    for text, found in zip(TEXTS, queries, strict=True):
        assert np.abs(found - embedding(model, folder, PROMPTS["query"] + text)).max() < 1e-5
    assert np.allclose(scores, [wanted[0] @ other for other in wanted], atol=1e-5)


def test_bits_do_not_depend_on_company_or_threads(gemma: tuple[Path, Any], caches: Path) -> None:
    found = []
    for threads in (1, 2):
        with LLM(str(gemma[0]), threads=threads) as llm:
            found.append([o.outputs.embedding for o in llm.embed(TEXTS)])
            found.append([llm.embed(text)[0].outputs.embedding for text in TEXTS])
    for other in found[1:]:
        assert all(map(np.array_equal, found[0], other))


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="not installed"
)
def test_the_library_says_the_same(gemma: tuple[Path, Any], caches: Path) -> None:
    import sentence_transformers

    folder, _ = gemma
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    with LLM(str(folder), **F32) as llm:
        for name in (None, "query", "document"):
            found = [o.outputs.embedding for o in llm.embed(TEXTS, prompt_name=name)]
            for text, vector in zip(TEXTS, found, strict=True):
                wanted = theirs.encode(text, prompt_name=name)
                assert np.abs(vector - wanted).max() < 1e-5


def test_the_default_prompt_is_put_before_texts_alone(
    gemma: tuple[Path, Any], tmp_path: Path, caches: Path
) -> None:
    _, model = gemma
    model.save_pretrained(tmp_path)
    write_modules(write_folder(tmp_path), {"pooling_mode": "max"}, "document")
    with LLM(str(tmp_path), **F32) as llm:
        [default] = llm.embed(TEXTS[0])
        [none] = llm.embed(TEXTS[0], prompt_name="")
        [ids] = llm.embed([llm.loaded.tokenizer.encode(TEXTS[0])])
        [cut] = llm.embed("w" * 300, truncate_prompt_tokens=-1)
    whole = llm.loaded.tokenizer.encode(PROMPTS["document"] + TEXTS[0])
    assert default.prompt_token_ids == whole
    assert default.prompt == TEXTS[0]
    assert np.array_equal(none.outputs.embedding, ids.outputs.embedding)
    assert not np.array_equal(none.outputs.embedding, default.outputs.embedding)
    assert len(cut.prompt_token_ids) == 128


def test_a_decoder_that_is_told_to_see_both_ways(tmp_path: Path, caches: Path) -> None:
    """As gte-Qwen2 is, by `is_causal` in config.json."""
    config = transformers.Qwen2Config(**SIZES, is_causal=False)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    with LLM(str(write_folder(tmp_path)), pooling="last", normalize=False, **F32) as llm:
        found = [o.outputs.embedding for o in llm.embed(prompts())]
    for prompt, vector in zip(prompts(), found, strict=True):
        mask = torch.zeros(1, 1, len(prompt), len(prompt))
        with torch.no_grad():
            states = model(torch.tensor([prompt]), attention_mask=mask).last_hidden_state[0]
        wanted = states[-1].numpy()
        assert np.linalg.norm(vector - wanted) < 2e-5 * np.linalg.norm(wanted)
