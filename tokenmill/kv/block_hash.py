"""Names of full blocks: two blocks have the same name exactly when they hold the same content.

A block's keys and values depend on its tokens, on all tokens before them, and on what else the
request brings along (a tenant's salt, an adapter). All of it goes into a cryptographic hash, so
that nobody can make up a prompt that is answered from the cache of another's.
"""

import hashlib
from array import array
from collections.abc import Sequence

from tokenmill.backends.base import BLOCK_SIZE


def root_name(salt: str, adapter: bytes = b"") -> bytes:
    """The parent of the first block; requests with different salts or adapters share no block.

    `adapter` is the digest of an adapter's content: what it is called, and where it lies, is no
    matter.
    """
    root = hashlib.sha256(b"tokenmill\0" + salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(root + adapter).digest() if adapter else root


def extend_names(names: list[bytes], root: bytes, tokens: Sequence[int]) -> None:
    """Append the names that are missing of the full blocks of `tokens`, whose first are there."""
    for start in range(len(names) * BLOCK_SIZE, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        parent = names[-1] if names else root
        block = array("i", tokens[start : start + BLOCK_SIZE])
        names.append(hashlib.sha256(parent + block.tobytes()).digest())
