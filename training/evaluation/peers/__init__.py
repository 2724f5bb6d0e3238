"""Other readers, run on the same images: tesseract, rapidocr, and models of the Hub.

    found, notes = subjects(["tesseract", "rapidocr", "hf:microsoft/trocr-base-printed"])
    for subject in found:
        texts = subject.read(samples)                 # as any subject of an evaluation
        readings = subject.readings(samples)          # with seconds and peak memory, failed ones among them

Each peer reads in a process of its own (`worker.py`, `workers/`), with as many threads as UNIT; rapidocr's has an
environment of its own too (`environment.py`). `unit peers install NAME` installs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.evaluation.contract import NotMeasured

if TYPE_CHECKING:
    from training.evaluation.peers.worker import WorkerSubject

KNOWN = ("tesseract", "rapidocr")
HUB = "hf:"  # before the folder or the id of a model


def check(names: Sequence[str]) -> None:
    """That each is the name of a peer; cheap.

    Raises:
        ValueError: one is not; the message lists what is known.
    """
    for name in names:
        if name not in KNOWN and not (name.startswith(HUB) and name != HUB):
            raise ValueError(
                f"unknown peer {name!r}; known: {', '.join(KNOWN)}, and {HUB}FOLDER_OR_ID for a TrOCR, Donut, Nougat "
                "or GOT-OCR2 model"
            )


def subjects(names: Sequence[str], device: str = "cpu") -> tuple[list[WorkerSubject], list[str]]:
    """The peers called ``names`` as subjects of an evaluation; no process is started and no weight is loaded.

    Args:
        names: of ``KNOWN``, or ``hf:`` with a folder or Hub id. "tesseract" gives two subjects: as it is, and with
            enlargement.
        device: of Hub models; the others run on the CPU.

    Returns:
        Subjects (role ``"peer"``, can READ) in the order of names, and one line for each peer that is not installed
        or cannot be reached, which says what to do.

    Raises:
        ValueError: an unknown name; the message lists what is known.
    """
    check(names)
    found: list[WorkerSubject] = []
    notes: list[str] = []
    for name in dict.fromkeys(names):
        try:
            found += _subjects_of(name, device)
        except NotMeasured as missing:
            notes.append(str(missing))
    return found, notes


def _subjects_of(name: str, device: str) -> list[WorkerSubject]:
    if name.startswith(HUB):
        from training.evaluation.peers.hub import HubReader

        return [HubReader(name.removeprefix(HUB), device)]
    from training.evaluation.peers import rapid, tesseract

    return {"tesseract": tesseract, "rapidocr": rapid}[name].subjects(device)


def install(name: str, progress: bool = True) -> Path:
    """Install one of ``KNOWN`` in the cache, apart from our own environment; nothing happens where it is there.

    Returns:
        Its folder.

    Raises:
        ValueError: no such peer, or one of the Hub, which needs no installing.
        RuntimeError: packages that cannot be had, no network; one line.
    """
    check([name])
    from training.evaluation.peers import environment

    makers: dict[str, Callable[[], Path]] = {
        "tesseract": lambda: environment.install_tesseract(progress),
        "rapidocr": lambda: environment.install_packages(
            environment.RAPIDOCR, environment.RAPIDOCR_PACKAGES, progress
        ),
    }
    if name not in makers:
        raise ValueError(f"{name} is a model of the Hub, read by transformers: there is nothing to install")
    return makers[name]()
