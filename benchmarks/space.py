"""The Space under load: `unit demo` in a process of its own, one visitor first, then many at a time.

    python -m benchmarks.space [--clients 20] [--runs 5] [--model FOLDER] [--out FILE.md]

- First useful paint: from the start of the process until its page is answered, and, where Chromium and Playwright are
  there, until the Read view's button can be pressed in a browser that was open already.
- First text: from the click on a sample page (a request through gradio_client, upload included) until the first text
  of it arrives; the median of the runs, and the slowest.
- Load: so many clients at once, spread evenly over the four views. Longest wait: from a client's request to its whole
  answer. Queued: clients that were told their place in the queue while they waited.
- Memory: the server's largest resident set from its start to the end of all this.

The clients run on the same machine and take their share of it. Targets, on two cores: 3 s, 2 s, none fails, 2 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tqdm import tqdm

from benchmarks.common import peak_memory
from training.evaluation.report import machine, markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = REPOSITORY / "spaces_demo" / "samples"
PAGE, PICTURE = SAMPLES / "pages" / "dice.png", SAMPLES / "pictures" / "dog.jpg"
VIEWS = {  # endpoint: file, further arguments
    "/read": (PAGE, [1]),
    "/name": (PICTURE, ["a dog, a duck, a panda"]),
    "/scales": (PICTURE, ["picture"]),
    "/look_inside": (PICTURE, [0, 0.6]),
}
PATIENCE = 300  # seconds for any one thing
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`unit demo`, from its start to its end.

    Attributes:
        started: when the process was, as `time.perf_counter()` tells it.
        ready: seconds from then until the model was loaded; `None` before.
        peak: bytes; known after the end.
    """

    def __init__(self, model: str | None):
        port = free_port()
        self.address = f"http://127.0.0.1:{port}/"
        self.ready: float | None = None
        self.peak = 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-u", "-m", "unit_cli", "demo", "--port", str(port)]
        command += ["--model", model] if model else []
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": self._folder.name}
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, cwd=REPOSITORY, env=environment, text=True
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            if line.rstrip().endswith("is ready"):
                self.ready = time.perf_counter() - self.started

    def since_start(self) -> float:
        return time.perf_counter() - self.started

    def check(self) -> None:
        """Raises:
        RuntimeError: the process has ended, or took too long.
        """
        if self._process.poll() is not None or self.since_start() > PATIENCE:
            self._errors.seek(0)
            trouble = self._errors.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"`unit demo` did not come up (status {self._process.returncode}):\n{trouble}")

    def wait_for_page(self) -> float:
        """Seconds from the start until the page was answered."""
        while True:
            self.check()
            try:
                with urllib.request.urlopen(self.address, timeout=PATIENCE) as answer:
                    answer.read()
                return self.since_start()
            except OSError:  # nobody listens yet
                time.sleep(0.02)

    def wait_until_ready(self) -> float:
        while self.ready is None:
            self.check()
            time.sleep(0.02)
        return self.ready

    def end(self) -> None:
        if self._process.returncode is not None:
            return
        status = Path(f"/proc/{self._process.pid}/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        high = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        self._process.send_signal(signal.SIGTERM)
        _, ended, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(ended)
        # Linux counts the memory of the process that starts another in the usage of that one, not in its status
        self.peak = high[0] if high else peak_memory(usage)
        self._listener.join(5)
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()


@contextlib.contextmanager
def open_browser() -> Iterator:
    """An empty page of a headless Chromium, or `None` where it or Playwright is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if sync_playwright is None or CHROMIUM is None:
        print("no Chromium or no Playwright: nothing is measured in a browser", file=sys.stderr)
        yield None
        return
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        yield page
        browser.close()


def click_to_text(page) -> float:
    """Seconds from a click on the first example in the browser until text stands in its box."""
    started = time.perf_counter()
    page.locator("button.gallery-item:visible").first.click()
    page.wait_for_function("document.querySelector('.unit-text-read textarea').value.length > 0")
    return time.perf_counter() - started


def connect(address: str, folder: str):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, download_files=folder)


def first_text(client) -> float:
    """Seconds from a request to read the sample page until the first part of the answer that has text."""
    from gradio_client import handle_file

    started = time.perf_counter()
    job = client.submit(handle_file(str(PAGE)), 1, api_name="/read")
    found = None
    for outputs in job:
        if found is None and outputs[1]:
            found = time.perf_counter() - started
    job.result(timeout=PATIENCE)
    if found is None:
        raise RuntimeError(f"{PAGE.name}: no text was read")
    return found


@dataclass
class Visit:
    """One client's request under load. `seconds`: from the request to the whole answer; `places`: in the queue, as it
    was told them, the next in turn having 0."""

    view: str
    seconds: float = 0.0
    places: list[int] = field(default_factory=list)
    failure: str | None = None


def attend(client, visit: Visit, together: threading.Barrier) -> None:
    from gradio_client import handle_file
    from gradio_client.utils import Status

    path, further = VIEWS[visit.view]
    together.wait(PATIENCE)
    started = time.perf_counter()
    try:
        job = client.submit(handle_file(str(path)), *further, api_name=visit.view)
        while not job.done() and time.perf_counter() - started < PATIENCE:
            status = job.status()
            if status.code is Status.IN_QUEUE and status.rank is not None and status.rank not in visit.places:
                visit.places.append(status.rank)
            time.sleep(0.05)
        answer = job.result(timeout=0)
        if not answer[1]:
            visit.failure = "an empty answer"
    except Exception as error:
        visit.failure = f"{type(error).__name__}: {error}"
    visit.seconds = time.perf_counter() - started


def load_test(address: str, clients: int, folder: str) -> list[Visit]:
    """All clients connect first, and then ask at the same time."""
    visits = [Visit(list(VIEWS)[number % len(VIEWS)]) for number in range(clients)]
    connected = [connect(address, folder) for _ in tqdm(visits, desc="connecting", unit="client")]
    together = threading.Barrier(clients)
    threads = [
        threading.Thread(target=attend, args=(client, visit, together), daemon=True)
        for client, visit in zip(connected, visits, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in tqdm(threads, desc="answers", unit="client"):
        thread.join()
    return visits


def told(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} s (slowest of {len(times)}: {max(times):.2f} s)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.space", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5, help="of what one visitor waits for (default: %(default)s)")
    parser.add_argument("--model", help="a folder or Hub id (default: the shipped checkpoint)")
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to as well")
    arguments = parser.parse_args(argv)
    if arguments.clients < 1 or arguments.runs < 1:
        parser.error("--clients and --runs must be at least 1")
    try:
        import gradio_client  # noqa: F401
    except ImportError:
        parser.error("gradio is missing: pip install 'unit-vision[demo]'")

    rows = []
    # gradio_client leaves an empty folder behind in the temporary one for each file that it fetches
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tempfile, "tempdir", folder):
        answered, usable, ready, clicked = [], [], [], []
        with open_browser() as page:
            for number in tqdm(range(arguments.runs), desc="starting", unit="run"):
                server = Server(arguments.model)
                try:
                    answered.append(server.wait_for_page())
                    if page is not None:
                        page.goto(server.address, wait_until="commit")
                        page.get_by_role("button", name="Read", exact=True).click(trial=True)
                        usable.append(server.since_start())
                    ready.append(server.wait_until_ready())
                    if page is not None:
                        clicked.append(click_to_text(page))
                        page.goto("about:blank")
                finally:
                    if number < arguments.runs - 1 or sys.exc_info()[0] is not None:
                        server.end()
        try:
            client = connect(server.address, folder)
            first = [first_text(client) for _ in tqdm(range(arguments.runs), desc="reading", unit="run")]
            visits = load_test(server.address, arguments.clients, folder)
            with urllib.request.urlopen(server.address, timeout=PATIENCE) as answer:
                alive = answer.status == 200
        finally:
            server.end()
    failed = [visit for visit in visits if visit.failure]
    queued = [visit for visit in visits if visit.places]
    longest = max(visits, key=lambda visit: visit.seconds)
    rows.append(["start to the page answered", told(answered), "3 s"])
    if usable:
        rows.append(["start to the Read view usable in Chromium", told(usable), "3 s"])
    rows.append(["start to the model loaded and warm", told(ready), ""])
    rows.append(["click on a sample page to its first text", told(first), "2 s"])
    if clicked:
        rows.append(["the same, clicked in Chromium on a fresh server", told(clicked), "2 s"])
    views = ", ".join(f"{count} {view[1:]}" for view, count in Counter(visit.view for visit in visits).items())
    rows.append([f"failures of {len(visits)} clients at once ({views})", len(failed), "0"])
    rows.append(["longest wait among them", f"{longest.seconds:.1f} s ({longest.view[1:]})", ""])
    rows.append(["half of them answered within", f"{statistics.median(v.seconds for v in visits):.1f} s", ""])
    places = f", {1 + max(max(visit.places) for visit in queued)} the furthest" if queued else ""
    rows.append(["clients told their place in the queue", f"{len(queued)}{places}", "shown"])
    rows.append(["server answers afterwards", "yes" if alive else "no", "yes"])
    rows.append(["peak memory of the server", f"{server.peak / 1e9:.2f} GB", "2 GB"])
    text = f"{machine()}\n\n{markdown_table(['what', 'measured', 'target'], rows)}\n"
    print("\n" + text)
    for visit in failed:
        print(f"{visit.view}: {visit.failure}", file=sys.stderr)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
