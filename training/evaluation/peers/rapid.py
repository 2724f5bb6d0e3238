"""rapidocr as a reader: PP-OCRv6 (small) through onnxruntime, in an environment of its own."""

from __future__ import annotations

import hashlib
import json

from training.evaluation.contract import NotMeasured
from training.evaluation.peers import environment
from training.evaluation.peers.worker import READ_TIMEOUT, WorkerSubject, script, threads

HOW_TO_INSTALL = "`unit peers install rapidocr`"


class RapidOCR(WorkerSubject):
    """rapidocr with its own settings, on the CPU; its models come with its package.

    It finds lines and gives them from top to bottom, those at one height from left to right; that order is kept, also
    over several columns. One line of the answer is one line found.

    Raises:
        NotMeasured: its environment is not there.
    """

    def __init__(self, timeout: float = READ_TIMEOUT):
        super().__init__("rapidocr", "rapidocr", "cpu", timeout)
        record = environment.record_of(environment.RAPIDOCR)
        if record is None or not environment.python_of(environment.RAPIDOCR).exists():
            raise NotMeasured(f"rapidocr is not installed: {HOW_TO_INSTALL}; its figures are left out")
        self.packages = record["packages"]

    def hash(self) -> str:
        """Over all packages of its environment with their versions; its settings are its own."""
        return hashlib.sha256(json.dumps(["rapidocr", self.packages]).encode()).hexdigest()

    def command(self) -> list[str]:
        python = environment.python_of(environment.RAPIDOCR)
        return script("rapidocr", {"threads": threads()}, python, "-I")


def subjects(device: str = "cpu") -> list[WorkerSubject]:
    """rapidocr."""
    return [RapidOCR()]
