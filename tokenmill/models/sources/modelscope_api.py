"""What ModelScope says of a repository, through its HTTP interface and without its library."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from tokenmill.errors import ModelNotFoundError, UsageError
from tokenmill.models.sources.http import Client, HttpError
from tokenmill.models.sources.receipt import FILE_NAME as RECEIPT
from tokenmill.models.sources.repository import choose_files
from tokenmill.models.sources.spec import HubSource

ENDPOINT = "https://modelscope.cn"
ENDPOINT_SETTINGS = ("MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN")
TOKEN_SETTING = "MODELSCOPE_API_TOKEN"
"""The settings are those of ModelScope's own library. The login that it stores is a pickle,
which can run code when it is read, so it is left alone."""

DEFAULT_BRANCHES = ("master", "main")

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository; `path` is its path there, `sha256` None where none is told."""

    path: str
    size_bytes: int
    sha256: str | None

    @property
    def name(self) -> str:
        """The name on the shelf, where all files of a model lie side by side."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The files to fetch, as they are at a revision."""

    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def make_client() -> Client:
    """The hub that the environment names. Raises UsageError where that is no address."""
    chosen = {name: text for name in ENDPOINT_SETTINGS if (text := _setting(name))}
    for name, text in chosen.items():
        endpoint = text if "://" in text else f"https://{text}"
        with contextlib.suppress(ValueError):  # brackets that are no address
            parts = urlsplit(endpoint)
            is_plain = re.fullmatch(r"[!-~]+", endpoint, re.ASCII)
            if parts.scheme in ("http", "https") and parts.hostname and is_plain:
                return Client(endpoint=endpoint.rstrip("/"), secrets=_secrets())
        raise UsageError(f"{name} is {text!r}, but must be an address as in {ENDPOINT}")
    return Client(endpoint=ENDPOINT, secrets=_secrets())


def _setting(name: str) -> str:
    return os.environ.get(name, "").strip()


def _secrets() -> dict[str, str]:
    """The token in both forms: older parts of the interface know only the cookie."""
    token = _setting(TOKEN_SETTING)
    if not token:
        return {}
    if not re.fullmatch(r"[!-:<-~]+", token, re.ASCII):
        raise UsageError(f"{TOKEN_SETTING} holds characters that no token has: copy it again")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}


def make_plan(client: Client, source: HubSource) -> Plan:
    """Ask which files there are, and choose. Raises as `choose_files` does, and HttpError."""
    revision, files = _list_files(client, source)
    chosen = choose_files(source, [path for path in files if path != RECEIPT])
    return Plan(revision=revision, files=tuple(files[path] for path in chosen))


def _list_files(client: Client, source: HubSource) -> tuple[str, dict[str, RemoteFile]]:
    """The revision, and by path what lies in the folder of which files are wanted."""
    wanted = source.revision or DEFAULT_BRANCHES[0]
    try:
        return wanted, _list_folder(client, source, wanted)
    except HttpError as error:
        if error.status != 404:
            raise
    known = _list_revisions(client, source)
    for branch in DEFAULT_BRANCHES[1:]:
        if source.revision is None and branch in known:
            return branch, _list_folder(client, source, branch)
    raise ModelNotFoundError(
        f"{source.place} has no revision {wanted!r}: it has {', '.join(known[:8]) or 'none'}"
    )


def _list_folder(client: Client, source: HubSource, revision: str) -> dict[str, RemoteFile]:
    """One folder and not the tree below it, whose listing the hub cuts off when it is long."""
    query = {"Revision": revision, "Recursive": "False"}
    if source.file and "/" in source.file:
        query["Root"] = str(PurePosixPath(source.file).parent)
    data = _ask(client, f"/api/v1/models/{source.repo}/repo/files", query)
    try:
        files = (_read_file(entry) for entry in data["Files"] or () if entry["Type"] != "tree")
        return {file.path: file for file in files}
    except (KeyError, TypeError, ValueError) as error:
        raise HttpError(None, "the list of files cannot be understood") from error


def _read_file(entry: dict[str, Any]) -> RemoteFile:
    path, size_bytes, sha256 = entry["Path"], entry["Size"], entry.get("Sha256") or None
    if not isinstance(path, str) or "\0" in path or type(size_bytes) is not int or size_bytes < 0:
        raise ValueError("a file needs a path and a size")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ValueError("a checksum has 64 digits")
    return RemoteFile(path=path, size_bytes=size_bytes, sha256=sha256)


def _list_revisions(client: Client, source: HubSource) -> list[str]:
    """Names of branches and tags."""
    data = _ask(client, f"/api/v1/models/{source.repo}/revisions", {})
    try:
        by_kind = data["RevisionMap"]
        kinds = (by_kind.get("Branches") or (), by_kind.get("Tags") or ())
        return [str(entry["Revision"]) for kind in kinds for entry in kind]
    except (KeyError, TypeError, AttributeError) as error:
        raise HttpError(None, "the list of revisions cannot be understood") from error


def _ask(client: Client, path: str, query: dict[str, str]) -> Any:
    """The data of an answer, which may be a refusal though its HTTP status is 200."""
    answer = client.get_json(path, query)
    if not isinstance(answer, dict) or "Data" not in answer:
        raise HttpError(None, f"{path} is answered with something that has no data")
    if answer.get("Success") is False or answer.get("Code", 200) not in (200, "200"):
        raise HttpError(None, f"{answer.get('Code')}: {answer.get('Message')}")
    return answer["Data"]


@contextlib.contextmanager
def hub_errors(source: HubSource, client: Client) -> Iterator[None]:
    """Turn a refusal, or none, into one readable line."""
    try:
        yield
    except HttpError as error:
        raise ModelNotFoundError(_explain(source, client, error)) from error


def _explain(source: HubSource, client: Client, error: HttpError) -> str:
    has_token = "Authorization" in client.secrets
    if error.status in (401, 403):
        advice = f"set {TOKEN_SETTING} to {'another' if has_token else 'a'} token that may read it"
        return f"ModelScope refuses {source.place} ({error}): {advice}"
    if error.status == 404:
        advice = "check" if has_token else f"if it is private, set {TOKEN_SETTING}; else check"
        return f"ModelScope has no {source.place} ({error}): {advice} its name on {client.endpoint}"
    return (
        f"tried {source.place}: {client.endpoint} cannot be used ({error}); check the network and "
        f"{ENDPOINT_SETTINGS[0]}"
    )
