"""The Space in a browser, used as a visitor does: headless Chromium driven by Playwright, the app on loopback.

    UNIT_SCREENSHOTS=docs/space python -m pytest tests/test_space_browser.py

keeps a picture of each view in each layout; without the variable none is written.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the Space needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'unit-vision[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")

ARGUMENTS = [
    "--no-sandbox",  # its sandbox refuses to start for root, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LAYOUTS = {"": (1280, 900, "light"), "-dark": (1280, 900, "dark"), "-phone": (390, 844, "light")}  # by file name
PICTURE_BYTES, PICTURE_WIDTH = 150_000, 900  # of a kept screenshot
PATIENCE = 120_000  # ms for an answer: many times what one takes, for machines that do other things too


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the app with the shipped checkpoint is served."""
    from spaces_demo import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        built = app.build()
        app.launch(built, "127.0.0.1", quiet=True)
        yield built.local_url
        built.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    """Chromium with a profile of its own, which Playwright makes and deletes."""
    home = str(tmp_path_factory.mktemp("home"))
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(
            executable_path=CHROMIUM, args=ARGUMENTS, env=os.environ | {"HOME": home, "XDG_CONFIG_HOME": home}
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, address):
    """Opens the app; afterwards: nothing was wrong in the console, and nobody else was asked for anything."""
    contexts, wrong, foreign = [], [], []
    host = urlsplit(address).netloc

    def note_console(message):
        if message.type == "error":
            wrong.append(message.text)

    def note_request(request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            foreign.append(request.url)

    def opened(layout=""):
        width, height, scheme = LAYOUTS[layout]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("console", note_console)
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on("request", note_request)
        page = context.new_page()
        page.goto(address)
        page.get_by_text("Model: unit-tiny").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert foreign == []


def examples(page):
    return page.locator("button.gallery-item:visible")


def text_read(page) -> str:
    return page.locator(".unit-text-read textarea").input_value()


def wait_for_text(page) -> None:
    """The whole page's: what a thread still reads when Python ends takes the process down with it."""
    results(page).get_by_text(re.compile(r"words in .* s")).wait_for()
    assert len(text_read(page)) > 20


def results(page):
    return page.locator(".unit-results:visible")


def fits_its_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def keep_screenshot(page, name: str) -> None:
    """The whole page, in a folder that the environment names, with as many colours as the file may have."""
    folder = os.environ.get("UNIT_SCREENSHOTS")
    if not folder:
        return
    page.wait_for_timeout(700)  # pictures fade in
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as taken:
        picture = taken.convert("RGB")
    if picture.width > PICTURE_WIDTH:
        size = (PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32):
        stream = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
        if len(stream.getvalue()) < PICTURE_BYTES:
            break
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_bytes(stream.getvalue())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_view_answers_to_a_click_on_an_example(visit, layout):
    page = visit(layout)
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", shade)[0]) < 100) == (layout == "-dark")
    assert fits_its_width(page)

    examples(page).first.click()
    wait_for_text(page)
    assert "Introduction" in text_read(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the text").click()
    assert Path(download.value.path()).read_text(encoding="utf-8") == text_read(page)
    assert fits_its_width(page)
    keep_screenshot(page, f"read{layout}.png")

    page.get_by_role("tab", name="Name", exact=True).click()
    page.get_by_label("Labels to choose from").fill("a dog, a panda, a clockwork orange")
    examples(page).nth(2).click()
    results(page).get_by_text("caption, confidence").wait_for()
    labels = results(page).locator(".unit-bars > span:first-child, .unit-bars > .unit-figure + span").all_inner_texts()
    assert sorted(labels) == ["a clockwork orange", "a dog", "a panda"]
    assert fits_its_width(page)
    keep_screenshot(page, f"name{layout}.png")

    page.get_by_role("tab", name="Scales", exact=True).click()
    examples(page).nth(1).click()
    results(page).get_by_text("The bars: mean cosine").wait_for()
    assert results(page).locator(".unit-card").count() == 4
    assert fits_its_width(page)
    keep_screenshot(page, f"scales{layout}.png")

    page.get_by_role("tab", name="Look inside", exact=True).click()
    examples(page).first.click()
    results(page).get_by_text("Mean cosine between the two").wait_for()
    shown = results(page).locator(".unit-card img")
    assert shown.count() == 3
    assert shown.evaluate_all("pictures => pictures.every((one) => one.complete && one.naturalWidth > 0)")
    assert fits_its_width(page)
    keep_screenshot(page, f"inside{layout}.png")


def test_an_example_is_read_by_the_keyboard_alone(visit):
    page = visit()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('gallery-item')"):
            break
    else:
        pytest.fail("the Tab key does not come to an example")
    page.keyboard.press("Enter")
    wait_for_text(page)


def test_a_file_that_is_no_picture_gets_a_message_and_the_next_one_is_read(visit, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    page = visit("-phone")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
    message = page.get_by_test_id("toast-text")
    message.wait_for()
    assert "not an image" in message.inner_text()
    assert text_read(page) == ""
    assert fits_its_width(page)
    examples(page).first.click()
    wait_for_text(page)
