"""The loop of every worker: one picture in, one text out, over pipes. The standard library alone, as it runs in the
environments of others.

Request, on standard input: four bytes, the length of a JSON object; the object, `{"id", "width", "height",
"x_height", "layout"}`; then `width * height * 3` bytes of RGB, row by row. Answer, on what was standard output: four
bytes and an object, `{"id", "text", "seconds", "peak"}` or `{"id", "error"}`. Before the first request the worker says
`{"ready": true, "version"}`, or `{"refused": line}` and ends. Nothing is unpickled at either end.
"""

import json
import os
import struct
import sys
import time


def peak_memory():
    """Bytes of memory that this process held at most; 0 where the system does not say.

    Not `ru_maxrss` on Linux: a process inherits that of the one that started it.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_line(error):
    """What an exception says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class Channel:
    """Requests in, answers out; whatever else a library prints goes to standard error."""

    def __init__(self):
        self.requests = os.fdopen(os.dup(0), "rb")
        self.answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)

    def say(self, answer):
        data = json.dumps(answer).encode()
        self.answers.write(struct.pack(">I", len(data)) + data)
        self.answers.flush()

    def next(self):
        """`(request, pixels)`, or None when the other side has closed."""
        length = self.requests.read(4)
        if len(length) < 4:
            return None
        request = json.loads(self.requests.read(struct.unpack(">I", length)[0]))
        size = request["width"] * request["height"] * 3
        pixels = self.requests.read(size)
        return (request, pixels) if len(pixels) == size else None


def serve(start):
    """Answer until the other side closes.

    Args:
        start: `() -> (version, read)`, which loads the engine and has it do something once. `read(pixels, request)`
            gives a text, or `(text, peak bytes)` where the work is done in another process or on a device.
    """
    channel = Channel()
    try:
        version, read = start()
    except Exception as error:
        channel.say({"refused": one_line(error)})
        return
    channel.say({"ready": True, "version": version})
    while True:
        received = channel.next()
        if received is None:
            return
        request, pixels = received
        begin = time.perf_counter()
        try:
            made = read(pixels, request)
        except Exception as error:
            channel.say({"id": request["id"], "error": one_line(error)})
            continue
        seconds = time.perf_counter() - begin
        text, peak = made if isinstance(made, tuple) else (made, peak_memory())
        channel.say({"id": request["id"], "text": text, "seconds": seconds, "peak": peak})
