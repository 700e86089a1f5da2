"""`tokenmill models`: what can be named, what is on disk, and how to be rid of it."""

import json
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenmill.models.eviction import SETTING, cache_limit_bytes, clear_cache, measure_cache
from tokenmill.models.home import format_bytes, home_dir
from tokenmill.models.sources.aliases import ALIASES
from tokenmill.models.sources.inventory import Holding, list_holdings, remove_model
from tokenmill.models.sources.shelf import make_shelf
from tokenmill.models.sources.spec import HubSource, PackageSource, parse_source


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model that has an alias, or is on disk, or both.

    `size_bytes` is that of the whole model where it is known, `disk_bytes` what is there of it;
    `path` is None where it is not whole.
    """

    name: str
    spec: str | None
    size_bytes: int | None
    disk_bytes: int
    path: Path | None
    description: str


def add_arguments(parser: ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    action.add_argument("--remove", metavar="NAME", help="delete a model that was fetched")
    action.add_argument(
        "--remove-caches",
        action="store_true",
        help="delete compiled code and packed weights, which the next start makes again",
    )


def models(*, as_json: bool, remove: str | None, remove_caches: bool) -> None:
    """List the models that have a short name, and those on disk; or delete."""
    if remove is not None:
        print(describe_removal(remove_model(remove)))
    elif remove_caches:
        print(f"Removed compiled code and packed weights: {format_bytes(clear_cache())} freed.")
    elif as_json:
        print(json.dumps(_as_json(list_models()), default=str, indent=2))
    else:
        rows = list_models()
        print("\n".join([*format_rows(rows), "", *describe_disk(rows)]))


def describe_removal(holding: Holding) -> str:
    """What was deleted, and how much became free."""
    if not holding.size_bytes:
        return f"Removed {holding.name}, whose files were gone already."
    parts = {
        "the model": holding.model_bytes,
        "an unfinished download": holding.partial_bytes,
    }
    what = " and ".join(name for name, size in parts.items() if size)
    return f"Removed {holding.name} ({what}): {format_bytes(holding.size_bytes)} freed."


def describe_disk(rows: list[Row]) -> list[str]:
    """How much of the disk is taken by what, and what may be done about it."""
    size, limit = measure_cache(), format_bytes(cache_limit_bytes())
    lines = {
        "Models": format_bytes(sum(row.disk_bytes for row in rows)),
        "Compiled code": format_bytes(size.compiled_code_bytes),
        "Packed weights": f"{format_bytes(size.packed_weights_bytes)}, with the code at most "
        f"{limit} ({SETTING})",
    }
    return [
        f"On disk, in {home_dir()}:",
        *(f"  {name + ':':16}{text}" for name, text in lines.items()),
    ]


def list_models(home: Path | None = None) -> list[Row]:
    """The aliases in their order, then what else was fetched."""
    holdings = {holding.shelf.folder.name: holding for holding in list_holdings(home)}
    rows = []
    for name, alias in ALIASES.items():
        source = parse_source(name)
        assert isinstance(source, HubSource | PackageSource)
        holding = holdings.pop(make_shelf(source, home).folder.name, None)
        rows.append(
            Row(
                name=name,
                spec=source.spec,
                size_bytes=holding.model_bytes if holding and holding.path else alias.size_bytes,
                disk_bytes=holding.size_bytes if holding else 0,
                path=holding.path if holding else None,
                description=alias.description,
            )
        )
    others = (holding for holding in holdings.values() if holding.size_bytes)
    return rows + [_row_without_alias(holding) for holding in others]


def _row_without_alias(holding: Holding) -> Row:
    return Row(
        name=holding.name,
        spec=holding.spec,
        size_bytes=holding.model_bytes if holding.path else None,
        disk_bytes=holding.size_bytes,
        path=holding.path,
        description="",
    )


def format_rows(rows: list[Row]) -> list[str]:
    """A table of left-aligned columns."""
    cells = [("NAME", "SIZE", "ON DISK", "WHAT IT IS")]
    for row in rows:
        size = "?" if row.size_bytes is None else format_bytes(row.size_bytes)
        cells.append((row.name, size, _on_disk(row), row.description or row.spec or ""))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return [
        "  ".join(
            [*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]
        ).rstrip()
        for line in cells
    ]


def _on_disk(row: Row) -> str:
    if not row.disk_bytes:
        return "no"
    return format_bytes(row.disk_bytes) + ("" if row.path else ", incomplete")


def _as_json(rows: list[Row]) -> dict[str, object]:
    return {
        "home": home_dir(),
        "models": [asdict(row) for row in rows],
        "caches": {**asdict(measure_cache()), "limit_bytes": cache_limit_bytes()},
    }
