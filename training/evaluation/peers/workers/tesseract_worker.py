"""tesseract, one process a picture: `python -I -S tesseract_worker.py SETTINGS`, JSON of `program`, `environment`,
`threads`, `timeout`.

A worker for it, and a small one, because Linux counts as the peak of a program also what the process that started it
held at that time; here that is less than any reading needs.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from serve import serve

SETTINGS = json.loads(sys.argv[1])
PAGE_SEGMENTATION = {"block": "6", "page": "3"}  # one uniform block of text; fully automatic


def run(pixels, request):
    """(standard output, peak bytes) of tesseract over one RGB picture."""
    command = [SETTINGS["program"], "stdin", "stdout", "-l", "eng", "--psm", PAGE_SEGMENTATION[request["layout"]]]
    environment = dict(os.environ, OMP_THREAD_LIMIT=str(SETTINGS["threads"]), **SETTINGS["environment"])
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        given.write(b"P6\n%d %d\n255\n" % (request["width"], request["height"]))
        given.write(pixels)
        given.seek(0)
        begin = time.monotonic()
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=errors, env=environment)
        stop = threading.Timer(SETTINGS["timeout"], process.kill)
        stop.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            stop.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode < 0 and time.monotonic() - begin >= SETTINGS["timeout"]:
            raise RuntimeError(f"tesseract gave no answer within {SETTINGS['timeout']:.0f} s")
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"tesseract failed with status {process.returncode}: {lines[-1]}")
        out.seek(0)
        text = out.read().decode("utf-8", "replace").replace("\f", "\n").strip()
    return text, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start():
    version = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [SETTINGS["program"], "--version"],
            capture_output=True,
            timeout=20,
            env=dict(os.environ, **SETTINGS["environment"]),
        )
        lines = (done.stdout or done.stderr).decode("utf-8", "replace").splitlines()
        version = lines[0] if lines else ""
    return version, run


if __name__ == "__main__":
    serve(start)
