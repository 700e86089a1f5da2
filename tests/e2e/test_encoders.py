"""Encoders of the BERT family against transformers in float32: random ones, and the real MiniLM."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from openai import BadRequestError, OpenAI

from tests.e2e.conftest import fetched
from tests.e2e.server_process import serving, strict_client
from tokenmill import LLM
from tokenmill.errors import UsageError

TEXTS = [
    "A dog runs.",
    "The quick brown fox jumps over the lazy dog; then it unbelievably naps.",
    "Déjà vu, 1234567 times & more — 東京",
    "word " * 180,
]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 131,
}
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "local_attention": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "bert, wide heads": ("BertModel", {"hidden_size": 96, "num_attention_heads": 1}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-r": ("XLMRobertaModel", {"pad_token_id": 5}),
    "distilbert": ("DistilBertModel", {"hidden_dim": 77}),
    "modernbert": ("ModernBertModel", MODERN | {"local_attention": 9}),
    "modernbert, three kinds of layers": ("ModernBertModel", MODERN | {"num_hidden_layers": 5}),
    "bert, scores": ("BertForSequenceClassification", {"num_labels": 1}),
    "xlm-r, scores": ("XLMRobertaForSequenceClassification", {"num_labels": 1, "pad_token_id": 1}),
}


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder, which the package index has."""
    return fetched("minilm")


def random_model(name: str) -> Any:
    """A model of transformers with random weights, of a size at which every part matters."""
    class_name, options = CASES[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**(SIZES | options), attn_implementation="eager")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in parameter_name:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            else:
                is_one = parameter_name.endswith(("orm.weight", "norm1.weight", "norm2.weight"))
                parameter.normal_(float(is_one), 0.4)
    return model


@pytest.mark.parametrize("name", CASES)
def test_random_models_are_those_of_transformers(name: str, tmp_path: Path, caches: Path) -> None:
    from tests.unit.tiny_tokenizers import write_folder

    model = random_model(name)
    model.save_pretrained(tmp_path)
    write_folder(tmp_path)
    rng = np.random.default_rng(1)
    first = 2 + model.config.pad_token_id  # padding within a text moves positions there
    prompts = [rng.integers(first, 260, n).tolist() for n in (1, 2, 17, 64, 100)]
    options = {"activations": "f32", "quantization": "f32", "max_num_batched_tokens": 150}
    with LLM(str(tmp_path), normalize=False, **options) as llm:
        params = llm.embedder.params()
        assert params.pooling == "cls"
        if llm.embedder.is_cross_encoder:
            requests = _raw_logits(llm, prompts)
        else:
            requests = [o.outputs.embedding for o in llm.embed(prompts)]
    for prompt, found in zip(prompts, requests, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([prompt]))
        wanted = output.logits[0] if hasattr(output, "logits") else output.last_hidden_state[0, 0]
        wanted = wanted.numpy()
        assert np.linalg.norm(found - wanted) < 2e-5 * max(1.0, np.linalg.norm(wanted))


def _raw_logits(llm: LLM, prompts: list[list[int]]) -> list[np.ndarray]:
    """What the classifier says of token ids, which `score` takes as texts only."""
    from queue import SimpleQueue

    events: SimpleQueue[Any] = SimpleQueue()
    params = llm.embedder.params()
    requests = [
        llm.embedder.request(prompt, params, sink=events.put, name="prompt") for prompt in prompts
    ]
    outputs = llm._outputs(requests, events, None)
    with pytest.raises(UsageError, match="cross-encoder, which scores pairs"):
        llm.embed("text")
    return [output.pooled for output in outputs if output.pooled is not None]


def write_word_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """A word a token, and the pairs of texts that BERT reads."""
    words = ["[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(250))]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    backend.save(str(folder / "tokenizer.json"))
    return backend


def test_a_cross_encoder_scores_pairs(tmp_path: Path, caches: Path) -> None:
    model = random_model("bert, scores")
    model.save_pretrained(tmp_path)
    backend = write_word_tokenizer(tmp_path)
    query, documents = "w1 w2 w3", ["w1 w2", "w9 w8 w200 w1", "w3 " * 50]
    with LLM(str(tmp_path), activations="f32", quantization="f32") as llm:
        together = [s.outputs.score for s in llm.score(query, documents)]
        turned = [s.outputs.score for s in llm.score(documents, [query] * 3)]
        cut = llm.score(query, documents[2], truncate_prompt_tokens=20)
    for pairs, found in (
        ([(query, d) for d in documents], together),
        ([(d, query) for d in documents], turned),
    ):
        for pair, score in zip(pairs, found, strict=True):
            encoded = backend.encode(*pair)
            ids, kinds = torch.tensor([encoded.ids]), torch.tensor([encoded.type_ids])
            with torch.no_grad():
                logit = model(ids, token_type_ids=kinds).logits[0, 0]
            assert score == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)
    assert together != turned
    assert cut[0].num_prompt_tokens == 20


class Oracle:
    """sentence-transformers' own definition, in torch: the mean of all states, normed."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def embed(self, text: str) -> np.ndarray:
        with torch.no_grad():
            ids = self.tokenizer([text], return_tensors="pt", truncation=True, max_length=256)
            mean = self.model(**ids).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(mean, dim=0).numpy()


@pytest.fixture(scope="module")
def expected(minilm: Path) -> list[np.ndarray]:
    oracle = Oracle(minilm)
    return [oracle.embed(text) for text in TEXTS]


def test_minilm_in_float32(minilm: Path, expected: list[np.ndarray], caches: Path) -> None:
    with LLM(str(minilm), activations="f32", quantization="f32") as llm:
        assert llm.max_model_len == 256  # of sentence_bert_config.json
        found = [output.outputs.embedding for output in llm.embed(TEXTS)]
        alone = [llm.embed(text)[0].outputs.embedding for text in TEXTS]
        assert all(map(np.array_equal, found, alone))
        long = "so it goes on and on, " * 200
        with pytest.raises(UsageError, match=r"prompt 0 has 1402 tokens.*takes 256"):
            llm.embed(long)
        [cut] = llm.embed(long, truncate_prompt_tokens=-1)
        assert len(cut.prompt_token_ids) == 256
        assert np.abs(cut.outputs.embedding - Oracle(minilm).embed(long)).max() < 1e-5
        scores = [s.outputs.score for s in llm.score(TEXTS[0], TEXTS)]
        with pytest.raises(UsageError, match="an encoder, which generates no text"):
            llm.generate("Once upon a time")
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() < 1e-5
    assert np.allclose(scores, [expected[0] @ e for e in expected], atol=1e-5)


def test_minilm_in_the_default_formats(
    minilm: Path, expected: list[np.ndarray], caches: Path
) -> None:
    """bf16 weights and activations: the error of a cosine is some 2e-5."""
    with LLM(str(minilm)) as llm:
        found = [output.outputs.embedding for output in llm.embed(TEXTS)]
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() < 2e-3
        assert 1 - a @ b < 1e-4


@pytest.fixture(scope="module")
def server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("encoder_home")
    flags = ("--served-model-name", "minilm", "--api-key", "sesame")
    with serving(minilm, home, *flags) as made:
        yield made.url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[OpenAI]:
    with strict_client(server, "sesame") as made:
        yield made


@pytest.fixture(scope="module")
def lenient(client: OpenAI) -> OpenAI:
    """For base64, which the client asks for and decodes, and which its own types leave out."""
    return OpenAI(base_url=client.base_url, api_key="sesame", max_retries=0, timeout=60)


def assert_expected(vectors: list[Any], expected: list[np.ndarray]) -> None:
    for vector, wanted in zip(vectors, expected, strict=True):
        assert np.abs(np.array(vector) - wanted).max() < 2e-3


def test_the_official_client_gets_floats(client: OpenAI, expected: list[np.ndarray]) -> None:
    made = client.embeddings.create(model="minilm", input=TEXTS, user="me", encoding_format="float")
    assert [item.index for item in made.data] == list(range(len(TEXTS)))
    assert made.usage.total_tokens == made.usage.prompt_tokens > 190
    assert_expected([item.embedding for item in made.data], expected)


def test_the_official_client_gets_base64(lenient: OpenAI, expected: list[np.ndarray]) -> None:
    """Without an encoding_format it asks for base64 and decodes it itself."""
    decoded = lenient.embeddings.create(model="minilm", input=TEXTS)
    assert_expected([item.embedding for item in decoded.data], expected)
    raw = lenient.embeddings.create(model="minilm", input=TEXTS, encoding_format="base64")
    data = [base64.b64decode(str(item.embedding)) for item in raw.data]
    assert_expected([np.frombuffer(each, "<f4") for each in data], expected)


def test_one_text_ids_and_lists_of_ids(lenient: OpenAI) -> None:
    [text] = lenient.embeddings.create(model="minilm", input="hi there").data
    ids = [101, 7632, 2045, 102]
    [one] = lenient.embeddings.create(model="minilm", input=ids).data
    both = lenient.embeddings.create(model="minilm", input=[ids, ids[:3]]).data
    assert text.embedding == one.embedding == both[0].embedding != both[1].embedding


def test_what_an_encoder_cannot(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="generates no text"):
        client.completions.create(model="minilm", prompt="hi")
    with pytest.raises(BadRequestError, match="generates no text"):
        client.chat.completions.create(model="minilm", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(BadRequestError, match="was not made for less than its 384"):
        client.embeddings.create(model="minilm", input="hi", dimensions=64)
    with pytest.raises(BadRequestError, match=r"input\[1\] has 302 tokens"):
        client.embeddings.create(model="minilm", input=["hi", "hi " * 300])


def test_documents_are_ranked(server: str) -> None:
    import httpx

    documents = ["Berlin is in Germany.", {"text": "Paris is the capital of France."}, "Bread"]
    body = {"query": "What is the capital of France?", "documents": documents}
    with httpx.Client(base_url=server, headers={"Authorization": "Bearer sesame"}) as http:
        ranked = http.post("/v1/rerank", json=body | {"top_n": 2}).json()
        scored = http.post(
            "/score", json={"text_1": body["query"], "text_2": ["Bread", "Berlin is in Germany."]}
        ).json()
    assert [r["index"] for r in ranked["results"]] == [1, 0]
    assert ranked["results"][0]["document"] == {"text": "Paris is the capital of France."}
    assert [d["index"] for d in scored["data"]] == [0, 1]
    assert scored["data"][1]["score"] == ranked["results"][1]["relevance_score"]
