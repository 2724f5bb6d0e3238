"""Any Hub model that reads, by id or folder: TrOCR, Donut, Nougat, GOT-OCR2, through transformers.

No remote code, weights from safetensors alone, in a process of our own environment (`workers/hub_worker.py`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from training.evaluation.cache import hash_of
from training.evaluation.contract import NotMeasured
from training.evaluation.peers.worker import WORKERS, WorkerSubject, script, threads

# Seconds for one page: these models write thousands of pieces one by one, which takes a CPU minutes [ours].
HUB_TIMEOUT = 900.0
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")

NOTES = {
    "trocr": "reads one line of text at a time: pages are cut into lines by UNIT's own layout, whose time counts",
    "donut": "reads with the prompt {prompt}; what is in its fields is taken as text, in its order",
    "nougat": "writes Markdown, as for whole pages of papers",
    "got_ocr2": "reads plain text of the whole picture",
}


class HubReader(WorkerSubject):
    """A reading model of transformers.

    Args:
        path: folder or Hub id. Of a repository only the configuration is fetched here, weights when it first reads.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        NotMeasured: there is no model there or the Hub cannot be reached, or it is of no known family; one line.
    """

    def __init__(self, path: str, device: str = "cpu", timeout: float = HUB_TIMEOUT):
        super().__init__(path.rstrip("/").rsplit("/", 1)[-1], f"hf:{path}", device, timeout)
        self.source = path
        self.folder = Path(path) if Path(path).is_dir() else None
        self.revision = None
        config = _json(self, "config.json")
        if config is None:
            raise NotMeasured(f"{path}: no config.json there; its figures are left out")
        self.family = family_of(
            config, _json(self, "preprocessor_config.json") or _json(self, "processor_config.json")
        )
        if self.family is None:
            raise NotMeasured(
                f"{path} is a {config.get('model_type')!r} model, which is none of TrOCR, Donut, Nougat and GOT-OCR2; "
                "its figures are left out"
            )
        self.notes = [f"{self.name} {NOTES[self.family].format(prompt='that its tokenizer has')}."]

    def hash(self) -> str:
        """Over a folder's files or a repository's commit, and how the family is read."""
        what = hash_of(self.folder, FILES) if self.folder else f"{self.source}@{self.revision}"
        return hashlib.sha256(json.dumps([what, self.family]).encode()).hexdigest()

    def command(self) -> list[str]:
        settings = {"source": self.source, "revision": self.revision, "family": self.family, "device": self.device}
        return script("hub", settings | {"threads": threads()})

    def environment(self) -> dict[str, str]:
        """Our packages are to be found there too, and libraries say nothing."""
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        return super().environment() | our_packages() | quiet


def our_packages() -> dict[str, str]:
    """Variables with which a process finds our packages, installed or not."""
    import os

    root = str(WORKERS.parents[3])
    return {"PYTHONPATH": os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)}


def family_of(config: dict, processor: dict | None) -> str | None:
    """``"trocr"``, ``"donut"``, ``"nougat"``, ``"got_ocr2"``, or None.

    Donut and Nougat are the same architecture; what prepares their pictures tells them apart.
    """
    if config.get("model_type") == "got_ocr2":
        return "got_ocr2"
    if config.get("model_type") != "vision-encoder-decoder":
        return None
    encoder = (config.get("encoder") or {}).get("model_type")
    if encoder != "donut-swin":
        return "trocr" if encoder in ("vit", "deit", "beit") else None
    return "nougat" if "nougat" in json.dumps(processor or {}).lower() else "donut"


def _json(reader: HubReader, name: str) -> dict | None:
    """A JSON file of the folder or the repository; None where it is not there."""
    if reader.folder is not None:
        file = reader.folder / name
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(reader.source, name, revision=reader.revision))
        except LocalEntryNotFoundError as error:
            raise NotMeasured(
                f"{reader.source}: the Hub cannot be reached and there is no copy of it here; name a folder, or leave "
                "it out"
            ) from error
        except EntryNotFoundError:
            return None
        except Exception as error:  # no such repository, no such name, no access: each has a type of its own
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise NotMeasured(f"{reader.source}: no folder, and nothing to be had from the Hub ({line})") from error
        reader.revision = file.parent.name  # snapshots/COMMIT/config.json
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
