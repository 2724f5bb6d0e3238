"""`unit data generate` with a kind that needs no fonts, for `test_data_generate.py`: a run that can be killed.

    python generate_process.py dots --count N --out DIR ...

The kind's settings: `slow`, seconds a row; `die`, a file whose absence makes row 7 kill its process; `bad`, every so
many rows one that cannot be made.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from training.data import generate
from training.data.schema import make_row


def dots(plan):
    """Rows of noise that seed and index decide."""

    def row(index):
        time.sleep(plan.settings.get("slow", 0))
        if (die := plan.settings.get("die")) and index == 7 and not Path(die).exists():
            Path(die).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        if (every := plan.settings.get("bad")) and index % every == 1:
            raise ValueError("a dot is missing")
        pixels = np.random.default_rng([plan.seed, index]).integers(0, 256, size=(8, 12), dtype=np.uint8)
        source = f"made-pages/dots/{plan.seed}#{index}"
        text = hashlib.sha1(source.encode()).hexdigest()
        return make_row(pixels, text, task="ocr", kind="document", source=source, license="CC0-1.0", split=plan.split)

    return generate.Maker(row, "dots")


generate.KINDS["dots"] = dots

if __name__ == "__main__":
    import generate_process  # noqa: F401  (the kind again, under a name that other processes can import)

    from unit_cli.__main__ import main

    sys.exit(main(["data", "generate", *sys.argv[1:]]))
