"""`tokenmill models`: what can be named, and what is on disk."""

import json
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenmill.models.eviction import SETTING, cache_limit_bytes, cache_size_bytes
from tokenmill.models.home import format_bytes
from tokenmill.models.sources.aliases import ALIASES
from tokenmill.models.sources.shelf import list_receipts
from tokenmill.models.sources.spec import HubSource, PackageSource, parse_source


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model that has an alias, or is on disk, or both; sizes in bytes."""

    name: str
    spec: str
    size_bytes: int
    path: Path | None
    description: str


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def models(*, as_json: bool) -> None:
    """List the models that have a short name, and those on disk."""
    rows = list_models()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], default=str, indent=2))
    else:
        print("\n".join([*format_rows(rows), "", describe_cache()]))


def describe_cache() -> str:
    """How much of the disk is taken by what was built from models, and may be deleted."""
    size, limit = format_bytes(cache_size_bytes()), format_bytes(cache_limit_bytes())
    return f"Compiled code and packed weights: {size} of at most {limit} ({SETTING})."


def list_models(home: Path | None = None) -> list[Row]:
    """The aliases in their order, then what else was fetched."""
    receipts = {receipt.spec: receipt for receipt in list_receipts(home)}
    rows = []
    for name, alias in ALIASES.items():
        source = parse_source(name)
        assert isinstance(source, HubSource | PackageSource)
        receipt = receipts.pop(source.spec, None)
        rows.append(
            Row(
                name=name,
                spec=source.spec,
                size_bytes=receipt.size_bytes if receipt else alias.size_bytes,
                path=receipt.model.path if receipt else None,
                description=alias.description,
            )
        )
    return rows + [
        Row(
            name=receipt.model.name,
            spec=spec,
            size_bytes=receipt.size_bytes,
            path=receipt.model.path,
            description="",
        )
        for spec, receipt in receipts.items()
    ]


def format_rows(rows: list[Row]) -> list[str]:
    """A table of left-aligned columns."""
    cells = [("NAME", "SIZE", "ON DISK", "WHAT IT IS")]
    for row in rows:
        on_disk = "yes" if row.path else "no"
        cells.append((row.name, format_bytes(row.size_bytes), on_disk, row.description or row.spec))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return [
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]
        )
        for line in cells
    ]
