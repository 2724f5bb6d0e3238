"""The Space in a browser, used as a visitor does: headless Chromium driven by Playwright, the app on loopback.

    UNIT_SCREENSHOTS=docs/space python -m pytest tests/test_space_browser.py

keeps a picture of each view in each layout; without the variable none is written.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw, ImageFont

pytest.importorskip("gradio", reason="the Space needs gradio")
gradio_client = pytest.importorskip("gradio_client")
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
SAMPLE = Path(__file__).resolve().parents[1] / "spaces_demo" / "samples" / "pages" / "dice.png"
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


@pytest.fixture(scope="module")
def pdf(tmp_path_factory):
    """Two pages: a line of text, and nothing."""
    page = Image.new("L", (640, 200), 255)
    text = "This section describes the files."
    ImageDraw.Draw(page).text((30, 60), text, font=ImageFont.load_default(26), fill=0)
    path = tmp_path_factory.mktemp("pdf") / "two pages.pdf"
    page.convert("RGB").save(path, save_all=True, append_images=[Image.new("RGB", (300, 300), "white")])
    return path


DROP = """([zone, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], name, { type: 'application/pdf' }));
  for (const kind of ['dragenter', 'dragover', 'drop'])
    zone.dispatchEvent(new DragEvent(kind, { dataTransfer: dropped, bubbles: true, cancelable: true }));
}"""


def tab_to(page, condition: str, most: int = 40) -> None:
    """Press the Tab key until what has the focus meets a condition in JavaScript on `it`."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate(f"(() => {{ const it = document.activeElement; return {condition}; }})()"):
            return
    pytest.fail(f"the Tab key does not come to where {condition}")


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
    page.get_by_role("button", name="Example: duck").click()
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


def test_every_view_is_used_by_the_keyboard_alone(visit):
    page = visit()
    page.get_by_role("button", name="Example: dice").wait_for()  # what a screen reader calls it
    tab_to(page, "it.classList.contains('gallery-item')")
    page.keyboard.press("Enter")
    wait_for_text(page)
    for view, words in (
        ("Name", "caption, confidence"),
        ("Scales", "The bars: mean cosine"),
        ("Look inside", "Mean cosine between the two"),
    ):
        page.locator("body").evaluate("() => document.activeElement.blur()")
        page.keyboard.press("Control+Home")
        page.get_by_role("tab", selected=True).first.focus()  # as with Shift+Tab from the view
        tab_to(page, f"it.getAttribute('role') === 'tab' && it.textContent.trim() === '{view}'")
        page.keyboard.press("Enter")
        tab_to(page, "it.classList.contains('gallery-item')")
        page.keyboard.press("Enter")
        results(page).get_by_text(words).wait_for()


def test_a_pdf_that_is_dropped_is_read_page_by_page_and_its_text_copied(visit, pdf):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    zone = page.locator("input[type=file]").first.locator("xpath=..").element_handle()
    page.evaluate(DROP, [zone, pdf.name, base64.b64encode(pdf.read_bytes()).decode()])
    results(page).get_by_text(re.compile(r"Page 1 of 2 · \d+ words in")).wait_for()
    text = text_read(page)
    assert "section" in text
    results(page).get_by_role("button", name=re.compile("copy", re.IGNORECASE)).first.click()
    page.wait_for_function("async (text) => (await navigator.clipboard.readText()) === text", arg=text)
    page.get_by_text("JSON: blocks with box").click()
    results(page).get_by_text("confidence", exact=False).last.wait_for()
    results(page).locator(".json-holder, .json-node").first.wait_for()
    page.get_by_label("Page of a PDF").fill("2")
    page.get_by_label("Page of a PDF").press("Enter")
    results(page).get_by_text("Page 2 of 2 · Nothing was found").wait_for()
    assert text_read(page) == ""
    page.get_by_label("Page of a PDF").fill("3")
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_test_id("toast-text").wait_for()
    assert "there is no page 3" in page.get_by_test_id("toast-text").inner_text()


def test_who_waits_is_shown_the_place_in_the_queue(visit, address):
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False, download_files=False)
    page = visit()
    sample = gradio_client.handle_file(str(SAMPLE))
    jobs = [client.submit(sample, 1, api_name="/read") for _ in range(2)]
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until and not any(job.status().rank is not None for job in jobs):
        time.sleep(0.05)  # until one of them is read and another waits
    examples(page).first.click()
    results(page).get_by_text(re.compile(r"queue: \d+/\d+")).first.wait_for()
    for job in jobs:
        job.result(timeout=PATIENCE / 1000)
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
