"""Readers that live in a process of their own, seen from this side: started, asked, timed, stopped, started again.

The other side is `workers/serve.py`, which also says what goes through the pipes. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.contract import READ, NotMeasured, TextSample

WORKERS = Path(__file__).parent / "workers"
# Seconds until a worker is given up [ours]: an engine's start loads weights; a dense page takes rapidocr up to 10 s
# and tesseract up to 3 s on a quiet machine of two cores, a busy one several times that.
START_TIMEOUT = 300.0
READ_TIMEOUT = 180.0
LARGEST_ANSWER = 1 << 24  # bytes; a page of text is thousands


class WorkerFailed(RuntimeError):
    """A worker died, hung or answered what no worker says; it has been stopped. One line."""


@dataclass(frozen=True)
class Reading:
    """What a reader made of one image.

    Attributes:
        text: a line feed between lines.
        seconds: from the decoded image to the text, the process's start and the pipe left out.
        peak: bytes that the process held at most so far, engine and weights included; 0 where that is not known.
        error: why it failed, in one line; ``""`` when it did not.
    """

    text: str
    seconds: float = 0.0
    peak: int = 0
    error: str = ""


class Worker:
    """A process that reads pictures.

    Args:
        command: program and arguments.
        environment: variables over those of this process.
        timeout: seconds for one picture. start_timeout: seconds until it is ready.

    Attributes:
        version: as it calls itself. startup: seconds from starting it to its being ready, weights loaded.

    Raises:
        NotMeasured: it says that it cannot run here, and why.
        WorkerFailed: it died or hung before it was ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout: float = READ_TIMEOUT,
        start_timeout: float = START_TIMEOUT,
    ):
        self.timeout, self._asked = timeout, 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process lives
        begin = time.perf_counter()
        try:
            # A session of its own, so that what it starts ends with it.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise NotMeasured(f"{command[0]} cannot be started: {error.strerror or error}") from error
        answer = self._exchange(None, b"", start_timeout)
        if "refused" in answer:
            self.close()
            raise NotMeasured(str(answer["refused"]))
        self.startup = time.perf_counter() - begin
        self.version = str(answer.get("version", ""))

    def read(self, image: Any, sample: TextSample) -> Reading:
        """Read an RGB PIL image. An error of the engine's own is in the answer.

        Raises:
            WorkerFailed: the process is no more; a new one is needed.
        """
        self._asked += 1
        image = image if image.mode == "RGB" else image.convert("RGB")
        request = {"id": self._asked, "width": image.width, "height": image.height}
        request |= {"x_height": sample.x_height, "layout": sample.layout}
        answer = self._exchange(request, image.tobytes(), self.timeout)
        if "error" in answer:
            return Reading("", error=str(answer["error"]))
        try:
            text, seconds, peak = answer["text"], float(answer["seconds"]), int(answer["peak"])
            if answer["id"] != self._asked or not isinstance(text, str):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            self._fail("answered what is no reading")
        return Reading(text, seconds, peak)

    def _exchange(self, request: dict | None, payload: bytes, timeout: float) -> dict:
        """Send a request, None for nothing, and wait for one answer; the process is killed after ``timeout``."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                data = json.dumps(request).encode()
                self._process.stdin.write(struct.pack(">I", len(data)) + data)
                self._process.stdin.write(payload)
                self._process.stdin.flush()
            length = self._process.stdout.read(4)
            size = struct.unpack(">I", length)[0] if len(length) == 4 else None
            data = self._process.stdout.read(size) if size is not None and size <= LARGEST_ANSWER else b""
        except (BrokenPipeError, OSError):
            size, data = None, b""
        except BaseException:  # interrupted: what is left in the pipe would be taken for the next answer
            self._kill()  # first: closing would wait for a process that does not read what is left to be written
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()  # it may be at it already
        if late.is_set():
            self._fail(f"gave no answer within {timeout:.0f} s")
        if size is None:
            self._fail("died")
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail("answered what is no reading")
        return answer

    def _fail(self, what: str) -> None:
        """Stop the process and raise :class:`WorkerFailed`, with the last line it wrote where it died."""
        self.close()
        said = ""
        if what == "died":
            self._errors.seek(0)
            lines = self._errors.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
            status = self._process.returncode
            how = f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"
            said = f" ({how}{': ' + lines[-1].strip() if lines else ''})"
        raise WorkerFailed(f"the reader's process {what}{said}")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and all that it started."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)  # the end of its input is its end; one that died keeps its own status
        self._kill()
        self._process.wait()


class WorkerSubject:
    """A peer that reads in a process of its own; see :class:`~training.evaluation.contract.Subject`.

    What one image does to the process hurts that image alone: one that died or hung is started anew for the next.

    Args:
        name, path: as the report and the command line call it.
        device: ``"cpu"`` or ``"cuda"``.
        timeout: seconds for one image.

    Attributes:
        notes: lines that a report of its figures must carry, such as how pages are cut for it.
        startup: seconds that its process took to be ready, the last time; None before it was started.
        version: as the process calls itself, ``""`` before it was started.
    """

    role = "peer"
    can = frozenset({READ})

    def __init__(self, name: str, path: str, device: str = "cpu", timeout: float = READ_TIMEOUT):
        self.name, self.path, self.device, self.timeout = name, path, device, timeout
        self.notes: list[str] = []
        self.startup: float | None = None
        self.version = ""
        self._worker: Worker | None = None
        self._failed: list[tuple[Any, Reading]] = []

    # What a kind of peer says of itself.

    def hash(self) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        """Program and arguments of its process."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Variables of its process: as many threads as UNIT has, in every library's spelling."""
        count = str(threads())
        return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)

    def prepared(self, sample: TextSample) -> Any:
        """The image as it is handed to the engine; the time this takes counts."""
        return sample.image

    # What all of them do.

    def start(self) -> Worker:
        """The process, started where there is none.

        Raises:
            NotMeasured: it does not come to be ready; one line.
        """
        if self._worker is None:
            try:
                self._worker = Worker(self.command(), self.environment(), self.timeout)
            except (NotMeasured, WorkerFailed) as error:
                raise NotMeasured(f"{self.name} cannot be run: {error}") from error
            self.startup, self.version = self._worker.startup, self._worker.version
        return self._worker

    def readings(self, samples: Sequence[TextSample]) -> list[Reading]:
        """One :class:`Reading` a sample, in order; failed ones among them.

        Raises:
            NotMeasured: the engine cannot run here at all.
        """
        return [self._reading(sample) for sample in samples]

    def _reading(self, sample: TextSample) -> Reading:
        if sample.image is None:
            return Reading("", error=sample.error or "there is no image")
        try:
            begin = time.perf_counter()
            image = self.prepared(sample)
            before = time.perf_counter() - begin
            made = self.start().read(image, sample)
        except WorkerFailed as error:
            self.release()
            return Reading("", error=str(error))
        return Reading(made.text, made.seconds + before, made.peak, made.error)

    def read(self, samples: Sequence[TextSample]) -> list[str]:
        """The texts of samples, in order.

        Raises:
            RuntimeError: one of them failed. The same samples asked for one by one are not read again.
        """
        known = self._failed
        made = []
        for sample in samples:
            found = [reading for image, reading in known if image is sample.image]
            made.append(found[0] if found else self._reading(sample))
        errors = [reading.error for reading in made if reading.error]
        if errors and len(samples) > 1:
            self._failed = [(sample.image, reading) for sample, reading in zip(samples, made, strict=True)]
        if errors:
            raise RuntimeError(f"{self.name}: {errors[0]}")
        return [reading.text for reading in made]

    def encoder(self) -> Any:
        raise NotMeasured(f"{self.name} is a reader, which has no encoder to measure")

    def describe(self, images: Sequence[Any]) -> list[str]:
        raise NotMeasured(f"{self.name} is a reader, which does not describe pictures")

    def release(self) -> None:
        """End its process; the next reading starts another."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def threads() -> int:
    """As many as torch computes with in this process, so that peers get as many as UNIT."""
    import torch

    return torch.get_num_threads()


def script(name: str, settings: Mapping[str, Any], python: str | Path = sys.executable, *options: str) -> list[str]:
    """Command line of one of ``workers/``, run by ``python``, with its settings as JSON."""
    return [str(python), *options, str(WORKERS / f"{name}_worker.py"), json.dumps(dict(settings))]
