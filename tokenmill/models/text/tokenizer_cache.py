"""Built tokenizers on disk: one line that says what the file is, then a tokenizer.json."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill import __version__
from tokenmill.fingerprint import code_fingerprint
from tokenmill.models.home import make_dir, write_atomically

if TYPE_CHECKING:
    import tokenizers


def read_cached_backend(path: Path, digest: str) -> "tokenizers.Tokenizer | None":
    """The tokenizer that was kept at `path` for the source with this digest.

    None where there is none, where it came from another source or version, or is damaged.
    """
    try:
        header, _, body = path.read_bytes().partition(b"\n")
    except OSError:  # nothing to read: the caller builds it, and hears of a disk that refuses
        return None
    if header != _header(digest, body):
        return None
    from tokenizers import Tokenizer as Backend

    return Backend.from_buffer(body)


def write_cached_backend(path: Path, digest: str, backend: "tokenizers.Tokenizer") -> None:
    """Keep a tokenizer. Raises CapacityError or UsageError where the disk refuses."""
    content = json.loads(backend.to_str())
    # A merge as one string parses a third faster than as two; the library reads both.
    if merges := content["model"].get("merges"):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    make_dir(path.parent)
    write_atomically(path, _header(digest, body) + b"\n" + body)


def _header(digest: str, body: bytes) -> bytes:
    from tokenizers import __version__ as library_version

    checksum = hashlib.sha256(body).hexdigest()
    code = code_fingerprint("models/text", "models/gguf")
    versions = f"tokenmill {__version__} {code} tokenizers {library_version}"
    return f"{versions} {digest} {checksum}".encode()
