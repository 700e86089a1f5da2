"""Which source code made what is kept on disk."""

import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


@cache
def code_fingerprint(*folders: str) -> str:
    """Hash of the modules in these folders of the package (`"backends/llvm"`), not below them.

    As part of the name of an entry of a cache it lets no edit leave a stale entry valid.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
