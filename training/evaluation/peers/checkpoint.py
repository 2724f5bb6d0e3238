"""A UNIT checkpoint read in a process of its own, as peers are: for what time and memory cost side by side."""

from __future__ import annotations

from training.evaluation.peers.hub import our_packages
from training.evaluation.peers.worker import WorkerSubject, script, threads


class CheckpointReader(WorkerSubject):
    """What `unit read` makes of pictures, one after the other, in a process that does nothing else.

    Args:
        path: folder of a full checkpoint. name: as the report calls it. hash_: of the subject that it stands for.
    """

    def __init__(self, path: str, name: str, hash_: str, device: str = "cpu"):
        super().__init__(name, path, device)
        self._hash = hash_

    def hash(self) -> str:
        """That of the checkpoint."""
        return self._hash

    def command(self) -> list[str]:
        return script("unit", {"source": self.path, "device": self.device, "threads": threads()})

    def environment(self) -> dict[str, str]:
        return super().environment() | our_packages() | {"TRANSFORMERS_VERBOSITY": "error"}
