"""Checkpoints as the evaluators see them: what reads, what encodes, and by which hash they are known.

Nothing here imports torch before a weight is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import first_line
from training.evaluation.cache import hash_of
from training.evaluation.contract import DESCRIBE, ENCODE, NAME, READ, NotMeasured

if TYPE_CHECKING:
    import torch
    from PIL import Image

# What decides what a checkpoint answers; logs, curves and cards do not.
DECIDING = ("*.safetensors", "*.json", "*.txt", "*.model")
ASIDE = ("evaluation", "trainer_state.json", "recipe.json")
# Most pieces of a page's Markdown: ours, twice what a page of 600 words takes with an English vocabulary of 32,000.
MARKDOWN_PIECES = 2048
# As `repetition_stopped` and `truncated` of the reader's blocks
REPETITION, TRUNCATED = "repetition stopped", "stopped at its limit"


@dataclass(frozen=True)
class ReadText:
    """One image as a subject read it: ``seconds`` spent, ``error`` in one line where it failed, and ``remarks`` of
    the reader itself, ``REPETITION`` or ``TRUNCATED``; ``markdown`` is what the reader makes of text and layout."""

    text: str
    seconds: float = 0.0
    error: str = ""
    remarks: tuple[str, ...] = ()
    markdown: str = ""


class ModelSubject:
    """A folder or a Hub repository of a full UNIT checkpoint, or of an encoder, UNIT's or transformers' own.

    See :class:`~training.evaluation.contract.Subject` for what it answers.

    Args:
        path: folder or Hub id.
        name: as the report calls it.
        role: ``"model"``, ``"teacher"``, ``"start"`` or ``"stage"``.
        device: where it runs.

    Raises:
        ValueError: there is no model there, or none that transformers or UNIT knows; one line.
    """

    def __init__(self, path: str | Path, name: str = "UNIT", role: str = "model", device: str = "cpu"):
        self.path, self.name, self.role, self.device = str(path), name, role, device
        self.folder = _local(self.path)
        try:
            self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no model there: config.json cannot be read ({error})") from error
        self.full = self.config.get("model_type") == "unit"
        # The file is training.teacher.PROJECTION_FILE; that module would import torch.
        names = bool(self.full and self.config.get("projection_dim"))
        names = names or (self.folder / "visual_projection.safetensors").is_file()
        can = {ENCODE} | ({READ, DESCRIBE} if self.full else set()) | ({NAME} if names else set())
        self.can = frozenset(can)
        self._reader: Any = None
        self._encoder: PictureEncoder | None = None

    makes_remarks = True  # of its readings, see ReadText

    @property
    def lays_out_markdown(self) -> bool:
        """Whether its readings of pages come with Markdown made from layout and text."""
        return self.full

    def check(self) -> None:
        """That its files are there and of a kind that is known; no weight is loaded.

        Raises:
            ValueError: no weights, or an architecture that neither UNIT nor transformers has; one line.
        """
        if not any(self.folder.glob("*.safetensors")):
            raise ValueError(f"{self.path}: no weights there: no *.safetensors beside config.json")
        if not self.full:
            from modeling_unit.vision_sources_unit import find_vision_source

            try:
                read_config(str(self.folder))
                find_vision_source(str(self.folder))
            except (OSError, ValueError) as error:
                line = first_line(error)
                raise ValueError(f"{self.path}: no encoder of pictures there ({line})") from error

    def hash(self) -> str:
        """Over names and contents of the files that decide what the model answers."""
        files = sorted({file for pattern in DECIDING for file in self.folder.glob(pattern)})
        return hash_of([file for file in files if file.name not in ASIDE])

    def reader(self) -> Any:
        """The :class:`modeling_unit.Reader` of a full checkpoint."""
        if self._reader is None:
            if not self.full:
                raise NotMeasured(f"{self.name} is a {self.config.get('model_type')!r} checkpoint, which cannot read")
            import modeling_unit

            _hush()
            self._reader = modeling_unit.Reader.from_pretrained(str(self.folder), device=self.device)
        return self._reader

    @property
    def writes_markdown(self) -> bool:
        """Whether it has a prompt for Markdown; known without loading weights."""
        try:
            settings = json.loads((self.folder / "processor_config.json").read_text(encoding="utf-8"))
            return self.full and "markdown" in settings["task_prompts"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def read(self, samples: Sequence[Any]) -> list[str]:
        """As `unit read` does: whole pages, blocks or lines, of any size. Samples that ask for Markdown are given to
        the model whole, with its Markdown prompt where it has one."""
        return [found.text for found in self.readings(samples)]

    def readings(self, samples: Sequence[Any]) -> list[ReadText]:
        """As :meth:`read`, with seconds, and what the reader itself says of a text."""
        found: dict[int, ReadText] = {}
        whole = [place for place, sample in enumerate(samples) if sample.markdown and self.writes_markdown]
        if whole:
            found |= zip(whole, self._read_whole([samples[place].image for place in whole]), strict=True)
        cut = [place for place in range(len(samples)) if place not in found]
        pages = self.reader().read_many([samples[place].image for place in cut]) if cut else []
        for place, page in zip(cut, pages, strict=True):
            stopped = any(block.repetition_stopped for block in page.blocks)
            truncated = any(block.truncated for block in page.blocks)
            remarks = (REPETITION,) * stopped + (TRUNCATED,) * truncated
            markdown = page.markdown if samples[place].layout == "page" else ""
            found[place] = ReadText(page.text, page.seconds, remarks=remarks, markdown=markdown)
        return [found[place] for place in range(len(samples))]

    def _read_whole(self, images: Sequence[Any]) -> list[ReadText]:
        """Markdown of whole pages, each seen at once."""
        reader = self.reader()
        start = time.perf_counter()
        inputs = reader.processor(images=list(images), task="markdown", return_tensors="pt")
        text_config = self.config.get("text_config") or {}
        room = int(text_config.get("max_position_embeddings") or 0) - inputs["input_ids"].shape[1]
        most = min(MARKDOWN_PIECES, room) if room > 0 else MARKDOWN_PIECES
        texts = reader.read_inputs(inputs, [most] * len(images))
        seconds = (time.perf_counter() - start) / len(images)
        return [ReadText(text, seconds) for text in texts]

    def describe(self, images: Sequence[Any]) -> list[str]:
        """As `unit describe` does."""
        return [caption.text for caption in self.reader().describe(images)]

    def encoder(self) -> PictureEncoder:
        """The encoder, loaded once."""
        if self._encoder is None:
            _hush()
            self._encoder = PictureEncoder(str(self.folder), self.device)
        return self._encoder

    def release(self) -> None:
        """Let go of the weights."""
        self._reader = self._encoder = None


def _hush() -> None:
    """No bars and hints of transformers between those of the evaluation."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def looks_like_folder(path: str) -> bool:
    """Whether it cannot be an id on the Hub, which is a name or an owner and a name."""
    return Path(path).is_absolute() or path.startswith((".", "~")) or path.rstrip("/").count("/") > 1


def _local(path: str) -> Path:
    """The folder of a model: itself, or a copy of a Hub repository."""
    if Path(path).is_dir():
        return Path(path)
    if looks_like_folder(path):
        raise ValueError(f"{path}: no model there: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[*DECIDING, "*.jinja"]))
    except Exception as error:  # the client of the network decides which, and it is not always an OSError
        line = first_line(error)
        raise ValueError(f"{path}: no model there, neither a folder nor a repository on the Hub ({line})") from error


class PictureEncoder:
    """A model as the picture suites see it: tokens of pictures, and their embedding in a sentence encoder's space.

    Args:
        path: folder or Hub id of a full UNIT checkpoint or of an encoder, UNIT's or transformers' own. An encoder that
            was trained as a teacher has its projection to the sentence encoder's space beside it.
        device: where it runs.

    Attributes:
        resolution: side in pixels of the pictures it takes, x1.
        patch_size: side of a patch in pixels.
        zero_shot: way of naming -> function of pictures to (B, 384) embeddings. ``""`` is the model's own: a full
            model's goes through the vision decoder, which is where the paper keeps recognition, an encoder's straight
            from the class token. ``"no vision decoder"`` takes a full model's class token as if it were the teacher's.
        naming: the same ways -> function of class tokens (B, D) as :meth:`tokens` gives them, for whoever has them.
        projection: (384, D) from the class token to the sentence encoder's space, or None.
        largest: largest magnitude among all patch tokens seen so far.
    """

    def __init__(self, path: str, device: str = "cpu"):
        from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor
        from modeling_unit.architectures_unit import architecture, prefix_tokens
        from modeling_unit.image_processing_unit import load_image_processor
        from modeling_unit.vision_sources_unit import find_vision_source
        from training.teacher import load_projection

        config = read_config(path)
        self.device = device
        self.naming: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.projection: torch.Tensor | None = None
        self.largest, self._squares, self._values = 0.0, 0.0, 0
        if isinstance(config, UnitConfig):
            self.model = UnitForPreTraining.from_pretrained(path)
            if config.projection_dim:
                self.projection = self.model.visual_projection.weight.detach()
                if prefix_tokens(config.vision_config):
                    self.naming[""] = self._decoded
        else:
            found = find_vision_source(path)
            config, self.model, self.prefix = found.config, found.load(None), prefix_tokens(found.config)
            self.projection = load_projection(path)
        ours = isinstance(config, UnitConfig) or architecture(config).ours
        # transformers' own processors crop, or make patches of the pictures: ours makes of all what the table says
        self.processor = load_image_processor(path) if ours else UnitImageProcessor(**found.image_settings)
        self.resolution = _resolution(self.processor)
        self.patch_size = self.processor.patch_size
        width = getattr(config, "vision_config", config).hidden_size
        if self.projection is not None and self.projection.shape[1] == width:
            self.projection = self.projection.to(device)
            self.naming["no vision decoder" if self.naming else ""] = self._projected
        self.zero_shot = {way: self._of_pictures(name) for way, name in self.naming.items()}
        self.model.eval().to(device)

    def pixels(self, pictures: list[Image.Image], resolution: int | None = None) -> torch.Tensor:
        """Square RGB pictures -> (B, 3, side, side), ``side`` being ``resolution`` in whole patches; x1 by default."""
        if resolution is None or resolution == self.resolution:
            return self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        import torch
        from PIL import Image

        side = max(1, round(resolution / self.patch_size)) * self.patch_size
        sized = [picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for picture in pictures]
        return torch.stack([torch.from_numpy(self.processor.normalize(each)) for each in sized]).to(self.device)

    def tokens(self, pictures: list[Image.Image], resolution: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Class token (B, D), the patches' mean where there is none, and patch tokens (B, N, D), row by row.

        Args:
            resolution: side in pixels at which the model is to see the square pictures; x1 by default.
        """
        import torch

        from modeling_unit.architectures_unit import run_encoder

        with torch.inference_mode():
            pixels = self.pixels(pictures, resolution)
            if hasattr(self.model, "encode"):
                prefix, patches, _, _ = self.model.encode(pixels)
            else:
                tokens = run_encoder(self.model, pixels).last_hidden_state
                prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
            values = patches.float()
            self.largest = max(self.largest, values.abs().max().item())
            self._squares += values.square().sum().item()
            self._values += values.numel()
            return (prefix[:, 0] if prefix.shape[1] else patches.mean(dim=1)), patches

    @property
    def root_mean_square(self) -> float:
        """Of all values of all patch tokens seen so far."""
        return (self._squares / max(1, self._values)) ** 0.5

    def _of_pictures(self, name: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda pictures, resolution=None: name(self.tokens(pictures, resolution)[0])

    def _decoded(self, classes: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            embeddings = self.model.visual_projection(self.model.vision_decoder(classes))
            return torch.nn.functional.normalize(embeddings.float(), dim=-1)

    def _projected(self, classes: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return classes.float() @ self.projection.float().T


def read_config(model: str):
    """The configuration in a folder or on the Hub.

    Raises:
        ValueError: there is none, or nothing that transformers or UNIT knows.
    """
    from transformers import AutoConfig

    import modeling_unit  # noqa: F401  registers UNIT's classes with the Auto classes

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no model there: {str(error).strip().splitlines()[0]}") from error


def _resolution(processor) -> int:
    """Side in pixels of the square pictures that an image processor makes."""
    if hasattr(processor, "base_size"):
        return processor.base_size
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    for key in ("height", "shortest_edge"):
        if key in size:
            return size[key]
    raise ValueError(f"{type(processor).__name__} does not say what size of picture it makes")
