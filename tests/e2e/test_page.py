"""The web page in a real browser: it chats, shows the engine at work, and changes its face."""

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.e2e.conftest import fetched
from tests.e2e.server_process import ServerProcess, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(smollm2: Path, warm_home: Path) -> Iterator[ServerProcess]:
    # A pool of some forty blocks: a few prompts fill it.
    flags = ("--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "16000000")
    with serving(smollm2, warm_home, *flags) as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    context = browser.new_context(locale="en-US", color_scheme="light")
    opened = context.new_page()
    opened.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
    opened.goto(server.url)
    yield opened
    context.close()


def test_a_question_is_answered_as_it_streams_in(page: Page) -> None:
    page.locator("summary").click()
    page.locator("#temperature").fill("0")
    page.locator("#prompt").fill("What is the capital of France?")
    page.locator("#prompt").press("Enter")
    answer = page.locator(".message.assistant")
    expect(answer).to_contain_text("Paris", timeout=60_000)
    expect(answer.locator(".meta")).to_contain_text("tok/s")
    expect(page.locator("#send")).to_be_enabled()


def test_stop_keeps_what_was_said_and_frees_the_engine(page: Page) -> None:
    page.locator("summary").click()
    page.locator("#temperature").fill("0")  # thousands of tokens follow, then
    page.locator("#prompt").fill(
        "Write a very long story about a mill on a river, with many chapters."
    )
    page.locator("#send").click()
    expect(page.locator(".message.assistant")).to_have_text(re.compile(r"\w"), timeout=60_000)
    page.locator("#stop").click()
    expect(page.locator(".message.assistant .meta")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0", timeout=10_000)


def colors_of_the_map(page: Page) -> set[tuple[int, int, int]]:
    """The colours in the middles of the map's cells, and between them."""
    values = page.evaluate(
        "() => { const c = document.getElementById('blocks');"
        " const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);"
        " const found = new Set(); for (let i = 0; i < data.length; i += 4)"
        " if (data[i + 3] === 255) found.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);"
        " return [...found]; }"
    )
    return {(value >> 16, value >> 8 & 255, value & 255) for value in values}


def swatch(page: Page, kind: str) -> tuple[int, int, int]:
    """The colour that the legend gives a kind of block."""
    color = page.evaluate(
        f"() => getComputedStyle(document.querySelector('.swatch.{kind}')).backgroundColor"
    )
    red, green, blue = map(int, re.findall(r"\d+", color))
    return red, green, blue


def test_paging_sharing_and_eviction_are_seen(page: Page, server: ServerProcess) -> None:
    expect(page.locator("#blocks-note")).to_contain_text("of 16 tokens", timeout=10_000)
    wanted = {kind: swatch(page, kind) for kind in ("used", "shared", "cached", "evicted")}
    assert len(set(wanted.values())) == 4
    seen: set[str] = set()
    url = f"{server.url}/v1/completions"

    def ask(number: int) -> None:
        prompt = f"Chapter {number}. " + "It was a long and quiet day in the village. " * 20
        body = {"prompt": prompt, "n": 2, "max_tokens": 24, "ignore_eos": True, "seed": 1}
        assert httpx.post(url, json=body, timeout=60).status_code == 200

    with ThreadPoolExecutor(1) as pool:
        asked = [pool.submit(ask, number) for number in range(12)]
        give_up_s = time.monotonic() + 90
        while seen != wanted.keys() and time.monotonic() < give_up_s:
            colors = colors_of_the_map(page)
            seen |= {kind for kind, color in wanted.items() if color in colors}
            page.wait_for_timeout(40)
        for future in asked:
            future.result()
    assert seen == wanted.keys()
    expect(page.locator("#events")).to_contain_text("cached blocks were given up")
    stats = httpx.get(f"{server.url}/engine/stats").json()
    assert stats["num_evictions"] > 0
    assert set(stats["last_evicted"]) <= set(range(stats["num_blocks"]))


def test_what_the_controls_say_is_asked_for(page: Page) -> None:
    page.locator("summary").click()
    controls = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.02}
    controls |= {"repetition_penalty": 1.2, "max_tokens": 9, "seed": 5}
    for name, value in controls.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#system").fill("Answer in one word.")
    answers = []
    for _ in range(2):
        page.locator("#prompt").fill("What is red?")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.locator("#send").click()
        answer = page.locator(".message.assistant")
        expect(answer.locator(".meta")).to_contain_text("tokens", timeout=60_000)
        answers.append(answer.locator("span").inner_text())
        page.locator("#clear").click()
    assert answers[0] == answers[1]  # of the same seed
    request: Request = asked.value
    body = request.post_data_json
    assert {name: body[name] for name in controls} == controls
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == "Answer in one word."


def test_a_key_is_asked_for_and_kept_for_the_tab(
    browser: Browser, smollm2: Path, warm_home: Path
) -> None:
    with serving(smollm2, warm_home, "--max-model-len", "256", "--api-key", "sesame") as server:
        page = browser.new_context(locale="en-US").new_page()
        page.goto(server.url)
        expect(page.locator("#notice")).to_have_text(re.compile("^The server wants an API key"))
        page.locator("summary").click()
        page.locator("#api_key").fill("sesame")
        page.locator("#api_key").press("Tab")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#kv")).to_contain_text("%", timeout=10_000)
        page.reload()
        expect(page.locator("#kv")).to_contain_text("%", timeout=10_000)
        page.context.close()


def test_language_and_theme_are_remembered(page: Page) -> None:
    page.locator("#language").click()
    expect(page.locator("#chat-title")).to_have_text("对话")
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("#chat-title")).to_have_text("对话")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_of_an_encoder_texts_are_compared(browser: Browser, warm_home: Path) -> None:
    with serving(fetched("minilm"), warm_home) as encoder:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
        page.goto(encoder.url)
        expect(page.locator("#messages")).to_contain_text("This model generates no text")
        expect(page.locator("#chat-title")).to_have_text("Compare texts")
        expect(page.locator("#temperature")).to_be_hidden()
        page.locator("#prompt").fill("just one line")
        page.locator("#send").click()
        expect(page.locator("#notice")).to_contain_text("at least two lines")
        page.locator("#prompt").fill("A dog runs.\nBread is baked.\nA puppy is running.")
        page.locator("#send").click()
        found = page.locator(".message.assistant")
        expect(found).to_have_count(2)
        expect(found.first).to_have_text(re.compile(r"0\.\d{3}  A puppy is running\."))
        page.locator("#language").click()
        expect(page.locator("#send")).to_have_text("比较")
        context.close()
