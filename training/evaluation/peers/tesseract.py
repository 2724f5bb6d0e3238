"""tesseract as a reader: as it is, and with the enlargement that suits it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.evaluation.cache import hash_of_file
from training.evaluation.contract import NotMeasured, TextSample
from training.evaluation.peers import environment
from training.evaluation.peers.worker import READ_TIMEOUT, WorkerSubject, script, threads

# x-height in pixels, chosen on pages of a package that is trained on [measured]: of 10 to 20 the best at every size,
# if by little (benchmarks/tesseract-upscale_amd-epyc_2026-11-23.md).
UPSCALE_TO = 12.0
HOW_TO_INSTALL = "`unit peers install tesseract`, or Debian's apt-get install tesseract-ocr"


class Tesseract(WorkerSubject):
    """The tesseract program, English, one process an image: blocks with ``--psm 6``, pages with ``--psm 3``.

    Its own process finds the reading order of a page. The peak of memory is that of the program alone, the seconds
    have its start in them, as everybody who calls it has.

    Args:
        upscale_to: x-height in pixels to which an image of smaller type is enlarged (bicubic) before reading; None
            reads it as it is. Images of unknown x-height are never enlarged.
        timeout: seconds for one image.

    Raises:
        NotMeasured: there is no tesseract, neither on the PATH nor installed by `unit peers install`.
    """

    resampling = "BICUBIC"  # of PIL

    def __init__(self, upscale_to: float | None = None, timeout: float = READ_TIMEOUT):
        name = "tesseract" if upscale_to is None else "tesseract, upscaled"
        super().__init__(name, "tesseract", "cpu", timeout)
        self.upscale_to = upscale_to
        self.program, self.variables = find_program()

    def hash(self) -> str:
        """Over the program's version, the hash of its English model, and the settings."""
        done = _ask(self.program, "--version", self.variables)
        listed = _ask(self.program, "--list-langs", self.variables)
        quoted = listed.split('"')
        model = Path(quoted[1]) / "eng.traineddata" if len(quoted) > 2 else None
        settings = {
            "version": done.splitlines()[:1],
            "model": hash_of_file(model) if model is not None and model.is_file() else "",
            "upscale_to": self.upscale_to,
            "resampling": self.resampling,
            "segmentation": "block 6, page 3",
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def command(self) -> list[str]:
        settings = {"program": self.program, "environment": self.variables, "threads": threads()}
        # The worker itself gives up first, and lives on.
        return script("tesseract", settings | {"timeout": 0.95 * self.timeout}, sys.executable, "-I", "-S")

    def prepared(self, sample: TextSample) -> Any:
        """The image, enlarged where its type is smaller than tesseract likes."""
        image = sample.image
        if self.upscale_to and 0 < sample.x_height < self.upscale_to:
            from PIL import Image

            factor = self.upscale_to / sample.x_height
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.convert("L").resize(size, Image.Resampling[self.resampling])
        return image


def find_program() -> tuple[str, dict[str, str]]:
    """tesseract and the variables it needs: the system's own where there is one, else that of `unit peers install`.

    Raises:
        NotMeasured: there is neither.
    """
    system = shutil.which("tesseract")
    if system is not None:
        return system, {}
    record = environment.record_of(environment.TESSERACT)
    if record is None or not Path(record["program"]).is_file():
        raise NotMeasured(f"tesseract is not installed: {HOW_TO_INSTALL}; its figures are left out")
    return record["program"], dict(record["environment"])


def subjects(device: str = "cpu") -> list[WorkerSubject]:
    """As it is, and with its best enlargement."""
    return [Tesseract(), Tesseract(upscale_to=UPSCALE_TO)]


def _ask(program: str, question: str, variables: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            [program, question], capture_output=True, text=True, timeout=20, env={**os.environ, **variables}
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout or done.stderr
