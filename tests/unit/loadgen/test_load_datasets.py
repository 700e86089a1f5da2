import json
import random

import pytest
from tiny_words import word_tokenizer

from tokenmill.errors import UsageError
from tokenmill.loadgen.datasets import DatasetOptions, load_dataset
from tokenmill.loadgen.vocabulary import ID_VOCABULARY, Vocabulary, word_vocabulary

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,480,10
2023-11-16 18:17:04.4799600,32,8
2023-11-16 18:17:14.0000000,5,8
"""
MOONCAKE = """{"timestamp": 2748, "input_length": 1300, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 5748, "input_length": 1536, "output_length": 3, "hash_ids": [0, 1, 9]}
"""


def load(vocabulary=ID_VOCABULARY, tokenizer=None, **options):
    return load_dataset(DatasetOptions(**options), vocabulary, tokenizer)


def written(tmp_path, text):
    path = tmp_path / "data"
    path.write_text(text)
    return path


def test_random_prompts_are_the_same_for_the_same_seed():
    options = {"num_prompts": 5, "input_len": 20, "output_len": 7}
    requests = load(**options)
    assert requests == load(**options)
    assert requests != load(**options, seed=1)
    assert [len(request.prompt) for request in requests] == [20] * 5
    assert {request.output_len for request in requests} == {7}
    assert len({tuple(request.prompt) for request in requests}) == 5


def test_random_lengths_stay_within_the_ratio():
    requests = load(num_prompts=300, input_len=100, output_len=10, range_ratio=0.5)
    lengths = {request.prompt_len for request in requests}
    assert min(lengths) < 60
    assert max(lengths) > 140
    assert lengths <= set(range(50, 151))
    assert {request.output_len for request in requests} == set(range(5, 16))


def test_a_prefix_is_shared():
    first, second = load(num_prompts=2, input_len=5, prefix_len=30)
    assert first.prompt[:30] == second.prompt[:30]
    assert first.prompt[30:] != second.prompt[30:]
    assert first.prompt_len == 35


def test_text_has_exactly_as_many_tokens():
    tokenizer = word_tokenizer()
    vocabulary = word_vocabulary(tokenizer)
    for request in load(vocabulary, num_prompts=20, input_len=50, range_ratio=0.9):
        assert len(tokenizer.encode(request.prompt)) == request.prompt_len


def test_words_and_ids_say_the_same():
    tokenizer = word_tokenizer()
    words = word_vocabulary(tokenizer)
    indices = words.draw(random.Random(0), 30)
    ids = Vocabulary(words.token_ids).prompt(indices)
    assert tokenizer.encode(words.prompt(indices)) == ids


def test_a_tokenizer_without_words_is_refused():
    with pytest.raises(UsageError, match="too few whole words"):
        word_vocabulary(word_tokenizer(num_words=10))


def test_azure(tmp_path):
    requests = load(name="azure", path=written(tmp_path, AZURE), trace_seconds=5, length_divisor=8)
    assert [(r.prompt_len, r.output_len, r.arrival_s) for r in requests] == [
        (60, 1, 0.0),
        (4, 1, 0.5),
    ]
    assert [len(request.prompt) for request in requests] == [60, 4]


def test_mooncake_shares_what_the_hash_ids_share(tmp_path):
    path = written(tmp_path, MOONCAKE)
    first, second = load(name="mooncake", path=path, length_divisor=16)
    assert (first.prompt_len, first.output_len, first.arrival_s) == (81, 31, 0.0)
    assert (second.prompt_len, second.output_len, second.arrival_s) == (96, 1, 3.0)
    assert first.prompt[:64] == second.prompt[:64]
    assert first.prompt[64:] != second.prompt[64:81]


def test_sharegpt(tmp_path):
    tokenizer = word_tokenizer()
    turns = [{"value": " aaaa" * 9}, {"value": " bbbb" * 30}]
    short = [{"value": " aaaa"}, {"value": " bbbb" * 30}]
    long = [{"value": " aaaa" * 1025}, {"value": " bbbb" * 30}]
    entries = [{"conversations": c} for c in (turns, short, long, turns[:1])] + [{"id": 1}]
    path = written(tmp_path, json.dumps(entries))
    requests = load(tokenizer=tokenizer, name="sharegpt", path=path, num_prompts=3)
    assert [(r.prompt_len, r.output_len) for r in requests] == [(9, 30)] * 3
    [request] = load(tokenizer=tokenizer, name="sharegpt", path=path, num_prompts=1, output_len=2)
    assert request.output_len == 2


@pytest.mark.parametrize(
    ("name", "text", "fragment"),
    [
        ("azure", "a,b\n1,2\n", "no Azure trace"),
        ("azure", AZURE + "yesterday,1,1\n", "line 5"),
        ("azure", AZURE + "2023-11-16 18:17:14.0000000,many,8\n", "line 5"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("mooncake", MOONCAKE + "{}\n", "line 3: no field 'timestamp'"),
        ("mooncake", MOONCAKE + "what\n", "line 3: no Mooncake request"),
        ("mooncake", "[1]\n", "line 1: no Mooncake request"),
        ("sharegpt", "{}", "no ShareGPT file"),
        ("sharegpt", '[{"conversations": [{"value": "x"}]}]', "no ShareGPT file"),
        ("sharegpt", "x", "not JSON"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, text, fragment):
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=fragment) as refused:
        load(tokenizer=word_tokenizer(), name=name, path=path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"name": "azure"}, "needs --dataset-path"),
        ({"name": "what"}, "is none of"),
        ({"num_prompts": 0}, "--num-prompts"),
        ({"range_ratio": 1.0}, "--random-range-ratio"),
        ({"name": "mooncake", "path": "x", "length_divisor": 7}, "must divide"),
    ],
)
def test_bad_options_are_refused(options, fragment):
    with pytest.raises(UsageError, match=fragment):
        DatasetOptions(**options)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(name="azure", path=tmp_path / "x")
