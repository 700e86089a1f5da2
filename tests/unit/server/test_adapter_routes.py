"""Adapters over HTTP: loaded, chosen by name, listed and unloaded while requests run."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.server.running import MODEL, Running, events_of, running_server, wait_for

TEXT = "a prompt that is long enough to fill some blocks of the cache"


@pytest.fixture
def made() -> Iterator[Running]:
    with running_server(adapter_slots=1) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Adapters by name; sql and copy have the same content."""
    for name, content in (("sql", "one"), ("copy", "one"), ("law", "two")):
        (tmp_path / name).write_text(content)
    return {path.name: str(path) for path in tmp_path.iterdir()}


def load(made: Running, name: str, path: str, **fields: object) -> str:
    answer = made.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **fields)
    assert answer.status_code == 200, answer.text
    return answer.text


def say(made: Running, model: str | None = None, **fields: object) -> str:
    asked: dict[str, object] = {} if model is None else {"model": model}
    asked |= {"max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answer = made.complete(TEXT, **asked, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or MODEL)
    return str(answer.json()["choices"][0]["text"])


def test_an_adapter_is_chosen_by_the_name_of_the_model(made: Running, files: dict[str, str]):
    assert "'sql' added" in load(made, "sql", files["sql"])
    load(made, "law", files["law"])
    plain, sql, law = say(made), say(made, "sql"), say(made, "law")
    assert len({plain, sql, law}) == 3
    assert [say(made), say(made, "sql"), say(made, "law"), say(made, "alias")] == [
        *(plain, sql, law, plain)
    ]
    chat = made.chat(model="sql", max_tokens=4, stream=True)
    assert {event["model"] for event in events_of(chat)} == {"sql"}


def test_adapters_are_listed_under_their_model(made: Running, files: dict[str, str]):
    load(made, "sql", files["sql"])
    listed = {card["id"]: card for card in made.client.get("/v1/models").json()["data"]}
    assert list(listed) == [MODEL, "alias", "sql"]
    assert listed["sql"]["parent"] == MODEL
    assert listed["sql"]["root"] == files["sql"]
    assert listed[MODEL]["parent"] is None
    assert made.client.get("/v1/models/sql").json() == listed["sql"]
    tokens = made.post("/tokenize", model="sql", prompt="hello").json()["tokens"]
    assert tokens == made.post("/tokenize", prompt="hello").json()["tokens"]


def test_an_unloaded_adapter_is_an_unknown_model(made: Running, files: dict[str, str]):
    load(made, "sql", files["sql"])
    assert say(made, "sql")
    assert "'sql' removed" in made.post("/v1/unload_lora_adapter", lora_name="sql").text
    error = made.refuse(made.complete(model="sql"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert made.client.get("/v1/models/sql").status_code == 404
    error = made.refuse(made.post("/v1/unload_lora_adapter", lora_name="sql"), 404)
    assert error["message"] == "no adapter 'sql' is loaded"


def test_unloading_waits_for_those_who_have_it(made: Running, files: dict[str, str]):
    load(made, "sql", files["sql"])
    alone = say(made, "sql")
    made.model.gate.clear()
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.append(say(made, "sql")), daemon=True)
    asking.start()
    wait_for(lambda: made.service.llm.engine.stats().running_loras == ("sql",))
    unloading = threading.Thread(
        target=lambda: made.post("/v1/unload_lora_adapter", lora_name="sql"), daemon=True
    )
    unloading.start()
    wait_for(lambda: made.client.get("/v1/models/sql").status_code == 404)
    made.refuse(made.complete(model="sql"), 404)
    load(made, "sql", files["law"])  # the name is free already
    assert unloading.is_alive()
    made.model.gate.set()
    unloading.join(10)
    asking.join(10)
    assert texts == [alone]
    assert say(made, "sql") != alone


def test_the_cache_is_shared_by_content_alone(made: Running, files: dict[str, str]):
    for name, path in files.items():
        load(made, name, path)

    def cached(model: str) -> int:
        usage = made.complete(TEXT, max_tokens=1, model=model).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(MODEL) == 0
    assert cached(MODEL) > 0
    assert cached("sql") == 0
    assert cached("law") == 0
    assert cached("copy") > 0


def test_a_name_is_taken_once_unless_it_is_to_be_replaced(made: Running, files: dict[str, str]):
    load(made, "sql", files["sql"])
    before = say(made, "sql")
    given = {"lora_name": "sql", "lora_path": files["law"]}
    error = made.refuse(made.post("/v1/load_lora_adapter", **given))
    assert error["message"].startswith("adapter 'sql' is loaded already, from ")
    assert say(made, "sql") == before
    load(made, "sql", files["law"], load_inplace=True)
    assert say(made, "sql") != before
    error = made.refuse(made.post("/v1/load_lora_adapter", lora_name="alias", lora_path="/"))
    assert error["param"] == "lora_name"


def test_what_cannot_be_loaded_is_refused(made: Running):
    error = made.refuse(
        made.post("/v1/load_lora_adapter", lora_name="a", lora_path="/nowhere/at/all"), 404
    )
    assert (error["param"], error["code"]) == ("lora_path", "adapter_not_found")
    for path in ("/" + "x" * 4000, "~nobody-at-all/x", "\0"):
        made.refuse(made.post("/v1/load_lora_adapter", lora_name="a", lora_path=path), 404)
    for fields in ({"lora_name": "a"}, {"lora_name": "", "lora_path": "/x"}, {"other": "/x"}):
        made.refuse(made.post("/v1/load_lora_adapter", **fields))


def test_many_adapters_take_turns_in_one_slot(made: Running, files: dict[str, str]):
    for name, path in files.items():
        load(made, name, path)
    names = [MODEL, *files, *files, MODEL]
    alone = {name: say(made, name) for name in set(names)}
    texts: dict[int, str] = {}

    def ask(index: int) -> None:
        texts[index] = say(made, names[index])

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [texts[i] for i in range(len(names))] == [alone[name] for name in names]


def test_more_adapters_than_fit_into_memory_are_read_again(files: dict[str, str]):
    with running_server(adapter_slots=1, max_cpu_loras=1) as made:
        for name, path in files.items():
            load(made, name, path)
        first = {name: say(made, name) for name in files}
        assert len(set(first.values())) == 2  # sql and copy say the same
        assert {name: say(made, name) for name in files} == first
        Path(files["sql"]).write_text("three")
        error = made.refuse(made.complete(model="sql"))
        assert "has changed since it was loaded: load it again" in error["message"]
        load(made, "sql", files["sql"], load_inplace=True)
        assert say(made, "sql") not in first.values()
        Path(files["law"]).unlink()
        error = made.refuse(made.complete(model="law"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'law' removed" in made.post("/v1/unload_lora_adapter", lora_name="law").text


def test_an_adapter_waits_outside_while_others_fill_the_memory(files: dict[str, str]):
    with running_server(adapter_slots=1, max_cpu_loras=1) as made:
        load(made, "law", files["law"])
        load(made, "sql", files["sql"])
        made.model.gate.clear()
        texts: list[str] = []
        asking = threading.Thread(target=lambda: texts.append(say(made, "sql")), daemon=True)
        asking.start()
        wait_for(lambda: made.service.llm.engine.stats().running_loras == ("sql",))
        answer = made.complete(model="law")
        error = made.refuse(answer, 429)
        assert error["code"] == "adapters_busy"
        assert answer.headers["Retry-After"] == "1"
        given = {"lora_name": "copy", "lora_path": files["copy"]}
        made.refuse(made.post("/v1/load_lora_adapter", **given), 429)
        assert made.client.get("/v1/models/copy").status_code == 404
        made.model.gate.set()
        asking.join(10)
        assert say(made, "law") not in texts


def test_metrics_tell_which_adapters_are_in_use(made: Running, files: dict[str, str]):
    load(made, "sql", files["sql"])
    made.model.gate.clear()
    asking = threading.Thread(target=lambda: say(made, "sql"), daemon=True)
    asking.start()
    wait_for(lambda: 'running_lora_adapters="sql"' in made.client.get("/metrics").text)
    assert 'max_lora="1"' in made.client.get("/metrics").text
    made.model.gate.set()
    asking.join(10)


def test_without_adapters_there_are_no_such_routes(shared: Running):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        shared.refuse(shared.post(path, lora_name="a", lora_path="/"), 404)
    assert "lora" not in shared.client.get("/metrics").text


def test_keys_guard_the_routes(files: dict[str, str]):
    with running_server(adapter_slots=1, api_keys=("sesame",)) as made:
        given = {"lora_name": "sql", "lora_path": files["sql"]}
        made.refuse(made.post("/v1/load_lora_adapter", **given), 401)
        made.refuse(made.post("/v1/unload_lora_adapter", lora_name="sql"), 401)
