"""A byte-level tokenizer with some whole words: " aaaa", " bbbb", and so on."""

from string import ascii_lowercase

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.models.text.tokenizer import Tokenizer


def word_tokenizer(num_words: int = 100) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    merges = []
    for number in range(num_words):
        first, second = ascii_lowercase[number % 26], ascii_lowercase[number // 26]
        parts = ["Ġ", first, first, first, second] if second != "a" else ["Ġ", *first * 4]
        for count in range(1, len(parts)):
            left, right = "".join(parts[:count]), parts[count]
            vocabulary.setdefault(left + right, len(vocabulary))
            if (left, right) not in merges:
                merges.append((left, right))
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
