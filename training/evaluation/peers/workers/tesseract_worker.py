"""tesseract, one process a picture: `python -I -S tesseract_worker.py SETTINGS`, JSON of `program`, `environment`,
`threads`, `timeout`.

Linux counts as the peak of a program (`ru_maxrss`) also what the process that started it held, so that the program's
own is watched while it runs.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

PAGE_SEGMENTATION = {"block": "6", "page": "3"}  # one uniform block of text; fully automatic
WATCHED_EVERY = 0.005  # seconds


def run(settings, pixels, request):
    """(standard output, peak bytes) of tesseract over one RGB picture."""
    command = [settings["program"], "stdin", "stdout", "-l", "eng", "--psm", PAGE_SEGMENTATION[request["layout"]]]
    environment = dict(os.environ, OMP_THREAD_LIMIT=str(settings["threads"]), **settings["environment"])
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        given.write(b"P6\n%d %d\n255\n" % (request["width"], request["height"]))
        given.write(pixels)
        given.seek(0)
        begin = time.monotonic()
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=errors, env=environment)
        stop = threading.Timer(settings["timeout"], process.kill)
        stop.start()
        peaks, ended = [0], threading.Event()
        watch = threading.Thread(target=watch_peak, args=(process.pid, peaks, ended))
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            stop.cancel()
            ended.set()
            watch.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode < 0 and time.monotonic() - begin >= settings["timeout"]:
            raise RuntimeError(f"tesseract gave no answer within {settings['timeout']:.0f} s")
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise RuntimeError(f"tesseract failed with status {process.returncode}: {lines[-1]}")
        out.seek(0)
        text = out.read().decode("utf-8", "replace").replace("\f", "\n").strip()
    counted = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return text, peaks[0] or counted


def watch_peak(pid, peaks, ended):
    """Put the most bytes that a process held, by its own memory alone, into ``peaks`` until it has ended."""
    while not ended.wait(WATCHED_EVERY):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            found = [1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
            peaks[0] = max(found + peaks)


def start(settings):
    """`(version, read)` of `serve`."""
    version = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [settings["program"], "--version"],
            capture_output=True,
            timeout=20,
            env=dict(os.environ, **settings["environment"]),
        )
        lines = (done.stdout or done.stderr).decode("utf-8", "replace").splitlines()
        version = lines[0] if lines else ""
    return version, lambda pixels, request: run(settings, pixels, request)


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from serve import serve

    serve(lambda: start(json.loads(sys.argv[1])))
