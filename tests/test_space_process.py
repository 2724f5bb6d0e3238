"""The demo's process: how it starts and how it ends, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "spaces_demo" / "samples" / "pages" / "anthology.png"  # several seconds of reading
PATIENCE = 120

IMPORTED = """
import sys
before = list(sys.meta_path)
import inspect
sources = []
getfile = inspect.getfile
inspect.getfile = lambda found: sources.append(found) or getfile(found)
from spaces_demo import app
import gradio.component_meta
assert sys.meta_path[-len(before):] == before and "_WithoutStubs" not in repr(sys.meta_path)
assert not [one for one in sources if getattr(one, "__module__", "").startswith("gradio.components")]
app.gr.Textbox("works").get_config()
assert not {"torch", "transformers"} & set(sys.modules)
app.build(lambda: None)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def environment(folder: Path) -> dict[str, str]:
    """Of a process whose temporary files all lie in `folder`, with its model offline."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "OMP_NUM_THREADS": "1",
    }


def test_the_page_is_built_without_torch_and_without_stub_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


class Served:
    """`unit demo`, and what it says."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-u", "-m", "unit_cli", "demo"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for(self, words: str) -> str:
        """The next line with these words."""
        for line in self.process.stdout:
            self.lines.append(line)
            if words in line:
                return line
        pytest.fail(f"ended with {self.process.wait()}: {self.process.stderr.read()}")

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """It ends with status 0 and says nothing of it."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, said) == (0, "")


@pytest.fixture
def serve(tmp_path):
    started = []

    def start() -> Served:
        started.append(Served(tmp_path))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_being_told_to_end_while_the_model_loads_is_a_clean_end(serve, tmp_path):
    served = serve()
    served.wait_for("UNIT is at")
    time.sleep(1.5)  # the loading has begun
    served.interrupt(signal.SIGTERM)
    assert not list(tmp_path.glob("unit-samples-*"))


def test_an_interrupt_while_a_page_is_read_is_a_clean_end(serve, tmp_path):
    served = serve()
    address = served.wait_for("UNIT is at").split()[3]
    served.wait_for("is ready")
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False, download_files=False)
    page = tmp_path / "page-of-a-visitor.png"
    page.write_bytes(PAGE.read_bytes())
    job = client.submit(gradio_client.handle_file(str(page)), 1, api_name="/read")
    begun = time.monotonic()
    while len(job.outputs()) < 2 and time.monotonic() - begun < PATIENCE:
        time.sleep(0.01)
    assert not job.done()
    assert list((tmp_path / "gradio").rglob(page.name))
    served.interrupt()
    assert not list((tmp_path / "gradio").rglob(page.name))
    assert not list(tmp_path.glob("unit-samples-*"))
