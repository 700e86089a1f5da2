"""GGUF files of encoders against transformers, and where it is there against llama.cpp."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType

from tests.e2e import encoder_files
from tests.e2e.test_encoders import SIZES, TEXTS, Oracle, minilm, random_model
from tokenmill import LLM
from tokenmill.errors import UnsupportedModelError

__all__ = ["minilm"]  # a fixture

F32 = {"activations": "f32", "quantization": "f32"}
PEER = os.environ.get("TOKENMILL_PEER_PYTHON")


def word_tokenizer() -> tokenizers.Tokenizer:
    """WordPiece with a word or its beginning a token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(200)), *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.add_special_tokens(special)
    return backend


def unigram_tokenizer() -> tokenizers.Tokenizer:
    """Unigram as XLM-R has it, without its table of replacements."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [(f"\u2581w{i}", -4.0 - i / 100) for i in range(200)]
    pieces += [(c, -6.0) for c in "abcdefghw"] + [("ab", -5.0), ("\u2581abc", -7.5)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Strip(),
            tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    backend.add_special_tokens(["<s>", "<pad>", "</s>"])
    return backend


def random_nomic() -> Any:
    config = transformers.NomicBertConfig(
        **(SIZES | {"hidden_size": 48}), pad_token_id=0, layer_norm_eps=1e-12
    )
    torch.manual_seed(0)
    model = transformers.NomicBertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(float("orm.weight" in name), 0.4)
    return model


def assert_states(llm: LLM, model: Any, position: int | None = 0) -> None:
    """`position` None: the mean."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(7, 210, n).tolist() for n in (1, 2, 17, 64, 100)]
    found = [o.outputs.embedding for o in llm.embed(prompts)]
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([prompt])).last_hidden_state[0].numpy()
        wanted = states.mean(0) if position is None else states[position]
        wanted = wanted / np.linalg.norm(wanted)
        assert np.linalg.norm(vector - wanted) < 2e-5


@pytest.mark.parametrize("name", ["bert", "bert, wide heads", "xlm-r"])
def test_random_models_are_those_of_transformers(name: str, tmp_path: Path, caches: Path) -> None:
    model = random_model(name)
    backend = unigram_tokenizer() if name == "xlm-r" else word_tokenizer()
    path = encoder_files.write_gguf(tmp_path / "model.gguf", model, backend)
    with LLM(str(path), **F32) as llm:
        assert llm.embedder.params().pooling == "cls"
        assert_states(llm, model)
        for text in ("w1 w22 abc", "  w3   aWb x ", "gh w0", "", "ab ab"):
            [output] = llm.embed(text)
            assert output.prompt_token_ids == backend.encode(text).ids
            assert llm.loaded.tokenizer.encode_pair(text, "w7")[0] == backend.encode(text, "w7").ids


def test_nomic_from_a_file_and_from_both_kinds_of_folder(tmp_path: Path, caches: Path) -> None:
    model, backend = random_nomic(), word_tokenizer()
    path = encoder_files.write_gguf(
        tmp_path / "model.gguf",
        model,
        backend,
        arch=MODEL_ARCH.NOMIC_BERT,
        pooling=encoder_files.MEAN,
    )
    with LLM(str(path), **F32) as llm:
        assert llm.embedder.params().pooling == "mean"
        assert_states(llm, model, None)
    model.save_pretrained(tmp_path / "new")
    backend.save(str(tmp_path / "new" / "tokenizer.json"))
    with LLM(str(tmp_path / "new"), pooling="mean", **F32) as llm:
        assert_states(llm, model, None)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    names = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    old = {names[key]: config[key] for key in names}
    kept = ("vocab_size", "type_vocab_size", "architectures")
    old |= {key: config[key] for key in kept}
    old |= {"rotary_emb_base": 1000, "activation_function": "swiglu", "prenorm": False}
    (tmp_path / "new" / "config.json").write_text(json.dumps(old))
    with LLM(str(tmp_path / "new"), pooling="mean", **F32) as llm:
        assert_states(llm, model, None)
    (tmp_path / "new" / "config.json").write_text(json.dumps(old | {"moe_every_n_layers": 2}))
    with pytest.raises(UnsupportedModelError, match="moe_every_n_layers is 2"):
        LLM(str(tmp_path / "new"))


def test_a_cross_encoder_in_a_file(tmp_path: Path, caches: Path) -> None:
    model, backend = random_model("xlm-r, scores"), unigram_tokenizer()
    path = encoder_files.write_gguf(
        tmp_path / "model.gguf", model, backend, pooling=encoder_files.RANK
    )
    documents = ["w4 w5", "w1 w2 w3 abc", "gh"]
    with LLM(str(path), **F32) as llm:
        scores = [s.outputs.score for s in llm.score("w1 w2", documents)]
    for document, score in zip(documents, scores, strict=True):
        ids = torch.tensor([backend.encode("w1 w2", document).ids])
        with torch.no_grad():
            wanted = torch.sigmoid(model(ids).logits[0, 0])
        assert score == pytest.approx(float(wanted), abs=1e-5)


@pytest.fixture(scope="module")
def minilm_file(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformers.AutoModel.from_pretrained(minilm)
    backend = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    return encoder_files.write_gguf(
        tmp_path_factory.mktemp("minilm") / "minilm-f16.gguf",
        model,
        backend,
        pooling=encoder_files.MEAN,
        encoding=GGMLQuantizationType.F16,
    )


def test_the_real_minilm_in_a_file(minilm: Path, minilm_file: Path, caches: Path) -> None:
    oracle = Oracle(minilm)
    with LLM(str(minilm_file), activations="f32", quantization="f32") as llm:
        made = llm.embed(TEXTS)
    for text, output in zip(TEXTS, made, strict=True):
        assert output.prompt_token_ids == oracle.tokenizer(text)["input_ids"]
        assert np.abs(output.outputs.embedding - oracle.embed(text)).max() < 1e-3
    with LLM(str(minilm_file)) as llm:  # as it is used
        for text, output in zip(TEXTS, llm.embed(TEXTS), strict=True):
            assert 1 - output.outputs.embedding @ oracle.embed(text) < 1e-4


def test_texts_are_cut_into_the_words_of_the_folders_tokenizer(
    minilm: Path, minilm_file: Path, caches: Path
) -> None:
    from tokenmill.models.gguf.reader import read_gguf
    from tokenmill.models.text.load import load_tokenizer

    found = load_tokenizer(read_gguf(minilm_file).metadata)
    wanted = load_tokenizer(minilm)
    texts = [
        *TEXTS,
        "Ünïcödé ÀÉÎ ﬁ ½ x² don't e-mail@example.com [MASK] [CLS] [unused5] ##ing",
        "tabs\tand\nnewlines\u00a0\u200b\ufffd\u0007 中文字符 한국어 عربى 😀",
        "a" * 300,
        "",
    ]
    for text in texts:
        assert found.encode(text) == wanted.encode(text)
        assert found.encode_pair(text, "so") == wanted.encode_pair(text, "so")
        ids = wanted.encode(text)
        assert found.decode(ids) == wanted.decode(ids)


PEER_SCRIPT = """
import json, sys
import xllamacpp as xlc
params = xlc.CommonParams()
params.model.path = sys.argv[1]
params.embedding = True
params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
params.pooling_type = xlc.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.n_parallel = 1
server = xlc.Server(params)
texts = json.loads(sys.argv[2])
answer = server.handle_embeddings({"input": texts})
print("RESULT" + json.dumps([item["embedding"] for item in answer["data"]]))
"""


@pytest.mark.skipif(PEER is None, reason="TOKENMILL_PEER_PYTHON names no interpreter")
def test_llama_cpp_makes_the_same_of_the_file(minilm_file: Path, caches: Path) -> None:
    texts = [text.strip() for text in TEXTS]
    ran = subprocess.run(
        [str(PEER), "-c", PEER_SCRIPT, str(minilm_file), json.dumps(texts)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "RESULT" in ran.stdout, ran.stderr[-2000:]
    theirs = json.loads(ran.stdout.split("RESULT")[1].splitlines()[0])
    with LLM(str(minilm_file), activations="f32") as llm:
        for output, wanted in zip(llm.embed(texts), theirs, strict=True):
            assert 1 - output.outputs.embedding @ np.array(wanted, np.float32) < 1e-4
