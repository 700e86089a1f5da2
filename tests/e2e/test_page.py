"""The web page in a real browser: it chats, shows the engine at work, and changes its face."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

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
    with serving(smollm2, warm_home, "--max-model-len", "1024", "--max-num-seqs", "8") as started:
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
    page.get_by_text("Settings").click()
    page.locator("#temperature").fill("0")
    page.locator("#prompt").fill("What is the capital of France?")
    page.locator("#prompt").press("Enter")
    answer = page.locator(".message.assistant")
    expect(answer).to_contain_text("Paris", timeout=60_000)
    expect(answer.locator(".meta")).to_contain_text("tok/s")
    expect(page.locator("#send")).to_be_enabled()


def test_stop_keeps_what_was_said_and_frees_the_engine(page: Page) -> None:
    page.locator("#prompt").fill("Count from one to one thousand in words.")
    page.locator("#send").click()
    expect(page.locator(".message.assistant")).to_have_text(re.compile(r"\w"), timeout=60_000)
    page.locator("#stop").click()
    expect(page.locator(".message.assistant .meta")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0", timeout=10_000)


def test_the_live_view_shows_a_map_of_the_cache(page: Page) -> None:
    expect(page.locator("#kv")).to_contain_text("%", timeout=10_000)
    expect(page.locator("#blocks-note")).to_contain_text("of 16 tokens")
    drawn = page.evaluate(
        "() => { const c = document.getElementById('blocks');"
        " return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v); }"
    )
    assert drawn


def test_language_and_theme_are_remembered(page: Page) -> None:
    page.locator("#language").click()
    expect(page.locator("#chat-title")).to_have_text("对话")
    page.locator("#theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("#chat-title")).to_have_text("对话")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
