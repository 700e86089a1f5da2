"""Models on the Hugging Face Hub.

Files lie in the Hub library's own cache, which other programs share; the shelf holds only the
receipt, so that the next start needs neither the network nor the library.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenmill.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError, UsageError
from tokenmill.models.home import make_dir, require_space, storage_errors
from tokenmill.models.progress import Progress
from tokenmill.models.sources.growth import Meter, watch_growth
from tokenmill.models.sources.local import LocalModel, open_local
from tokenmill.models.sources.receipt import FileRecord, Receipt, hash_file, record_file
from tokenmill.models.sources.repository import choose_files
from tokenmill.models.sources.shelf import Shelf
from tokenmill.models.sources.spec import HubSource

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import ModelInfo

SETTING = "HF_HOME"
"""The environment variable that moves the Hub library's cache."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One commit's files to fetch: the size of each, and its SHA-256 where the Hub says it."""

    repo: str
    commit: str
    sizes: dict[str, int]
    checksums: dict[str, str]

    @property
    def repo_cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    def present_bytes(self) -> int:
        snapshot = self.repo_cache / "snapshots" / self.commit
        return sum(size for name, size in self.sizes.items() if (snapshot / name).exists())


def fetch_repo(source: HubSource, shelf: Shelf, progress: Progress) -> LocalModel:
    """Download what is missing, verify it, and write the receipt. Needs the shelf's lock."""
    with _hub_errors(source):
        plan = _make_plan(source)
        snapshot = _download(source, plan, progress)
    records = _verify(source, plan, snapshot, progress)
    place = snapshot / source.file if source.file else snapshot
    model = open_local(place, source.name)
    make_dir(shelf.partial)
    return shelf.install(Receipt(spec=source.spec, model=model, files=records))


def find_cached(source: HubSource) -> LocalModel | None:
    """The model as another program left it in the Hub library's cache, without the network."""
    from huggingface_hub import try_to_load_from_cache

    key = source.file or "config.json"
    found = try_to_load_from_cache(source.repo, key, revision=source.revision)
    if not isinstance(found, str):
        return None
    try:
        return open_local(Path(found) if source.file else Path(found).parent, source.name)
    except (ModelFileError, UnsupportedModelError):
        return None  # another program may have fetched only a part


def _make_plan(source: HubSource) -> Plan:
    from huggingface_hub import HfApi

    info: ModelInfo = HfApi(library_name="tokenmill").model_info(
        source.repo, revision=source.revision, files_metadata=True
    )
    files = {file.rfilename: file for file in info.siblings or []}
    chosen = choose_files(source, list(files))
    return Plan(
        repo=source.repo,
        commit=info.sha or source.revision or "main",
        sizes={name: files[name].size or 0 for name in chosen},
        checksums={name: lfs.sha256 for name in chosen if (lfs := files[name].lfs)},
    )


def _download(source: HubSource, plan: Plan, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    total, present = sum(plan.sizes.values()), plan.present_bytes()
    with storage_errors(plan.repo_cache, SETTING):
        plan.repo_cache.mkdir(parents=True, exist_ok=True)
    require_space(plan.repo_cache, total - present, SETTING)
    with progress.task(f"fetching {source.name}", total) as task:
        meter = Meter(task, total)
        meter.reach(present)
        with (
            watch_growth(plan.repo_cache / "blobs", meter, present),
            storage_errors(plan.repo_cache, SETTING),
        ):
            folder = snapshot_download(
                plan.repo,
                revision=plan.commit,
                allow_patterns=[glob.escape(name) for name in plan.sizes],
                library_name="tokenmill",
                tqdm_class=_make_silent_bar(),
            )
        meter.reach(total)
    return Path(folder)


def _make_silent_bar() -> type[Any]:
    """The Hub library's progress bar class, mute: progress is told in one way only."""
    from huggingface_hub import utils

    hub_bar = cast(Any, utils).tqdm

    class SilentBar(hub_bar):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar


def _verify(
    source: HubSource, plan: Plan, snapshot: Path, progress: Progress
) -> tuple[FileRecord, ...]:
    records = []
    with progress.task(f"checking {source.name}", sum(plan.sizes.values())) as task:
        for name in plan.sizes:
            path = snapshot / name
            sha256 = hash_file(path, task)
            if plan.checksums.get(name, sha256) != sha256:
                raise ModelFileError(
                    f"{path} has the wrong checksum: remove {path.resolve()} and `tokenmill pull` "
                    "it again"
                )
            records.append(record_file(snapshot, str(path), sha256))
    return tuple(records)


@contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Turn what the Hub library raises into one readable line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{source.place} is gated: accept its terms on its page, then `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the Hub has no repository {source.repo} (if it is private, `hf auth login` or set "
            "HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{source.place} has no revision {source.revision!r}") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{source.spec!r} cannot be the name of a repository") from error
    except errors.HfHubHTTPError as error:
        raise _refusal(source, error) from error
    except _network_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"tried {source.place}: the Hub cannot be reached ({reason}); check the network and "
            "HF_ENDPOINT"
        ) from error


def _refusal(source: HubSource, error: "HfHubHTTPError") -> ModelNotFoundError:
    """What is said of an answer that is no model: the token is wrong, or the Hub is in trouble."""
    status = error.response.status_code
    if status in (401, 403):
        return ModelNotFoundError(
            f"the Hub refuses {source.place} ({status}): it does not know the token, or the token "
            "may not read this repository; `hf auth login` again, or set HF_TOKEN to another"
        )
    return ModelNotFoundError(
        f"tried {source.place}: the Hub cannot be reached (it answers {status}); try again later, "
        "and check HF_ENDPOINT"
    )


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and the HTTP library's own class, which the Hub library's error extends."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (OSError, *bases)
