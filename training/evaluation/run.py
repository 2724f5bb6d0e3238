"""`unit evaluate`: measure a checkpoint on the held-out blocks and pictures, write the report.

    unit evaluate MODEL --suite text,image --peers tesseract --out evaluation

writes ``results.json``, ``report.md``, ``report.png`` and, for the text suite, one ``text-READER.jsonl`` per reader
with every block, worst first. Held-out data is looked for where `unit data` puts it, unless named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from training.data.sources import data_folder
from training.evaluation.report import machine, tables, write_report

SUITES = ("text", "image")


def evaluate(
    model: str,
    suites: Sequence[str] = SUITES,
    out: str | Path = "evaluation",
    *,
    limit: int | None = None,
    peers: Sequence[str] = (),
    blocks: str | Path | None = None,
    pictures: str | Path | None = None,
    teacher: str | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    progress: bool = True,
) -> dict:
    """Run ``suites`` on ``model`` and write the report into ``out``.

    Args:
        model: a folder or Hub id of a full UNIT checkpoint; for pictures alone, of an encoder too.
        suites: any of ``"text"`` and ``"image"``.
        out: folder for the report; made when missing.
        limit: at most so many blocks, spread evenly over the set; ``None`` for all. Pictures are few: always all.
        peers: ``"tesseract"`` reads the same blocks. A peer that is not installed is left out with a note.
        blocks, pictures: folders of held-out data; by default where `unit data` puts them.
        teacher: folder or Hub id of the encoder before training, measured on the same pictures.
        batch_size: of reading and of encoding.
        device: where the model runs, ``"cpu"`` or ``"cuda"``.
        progress: show progress bars.

    Returns:
        What was written to ``results.json``; see :mod:`training.evaluation.report`.

    Raises:
        ValueError: an unknown suite or peer, a limit below 1, or held-out data that is not there.
    """
    from training.evaluation.text import PEERS

    _known(suites, SUITES, "suite")
    _known(peers, PEERS, "peer")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results: dict = {"model": str(model), "machine": machine(device)}
    if "text" in suites:
        folder = Path(blocks) if blocks is not None else data_folder("blocks-validation")
        results["text"] = _text_suite(model, folder, out, limit, peers, batch_size, device, progress)
    if "image" in suites:
        folder = Path(pictures) if pictures is not None else data_folder("pictures-validation")
        results["image"] = _image_suite(model, teacher, folder, batch_size, device)
    results["seconds"] = round(time.perf_counter() - start, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(results, out)
    return results


def _known(given: Sequence[str], known, what: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _read_config(model: str):
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


def _text_suite(
    model: str,
    folder: Path,
    out: Path,
    limit: int | None,
    peers: Sequence[str],
    batch_size: int,
    device: str,
    progress: bool,
) -> dict:
    """Every reader on the same blocks: the model first, then each peer that is installed."""
    from training.evaluation.text import PEERS, Blocks, PeerMissing, evaluate_text, reads_images

    blocks = Blocks(folder, limit)
    readers = {"UNIT": reads_images(page_reader(model, device))}
    notes = []
    for peer in peers:
        try:
            readers |= PEERS[peer]()
        except PeerMissing as missing:
            notes.append(str(missing))
            print(missing, file=sys.stderr)
    found = []
    for name, read in readers.items():
        result = evaluate_text(read, blocks, name=name, batch_size=batch_size, progress=progress)
        result.write_items(out / f"text-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.jsonl")
        found.append(result.to_dict())
        if result.failed:
            notes.append(f"{name} failed on {result.failed} of {result.blocks} blocks; they count as read empty.")
    return {"blocks": _shown(folder), "readers": found, "notes": notes}


def page_reader(model: str, device: str = "cpu") -> Callable[[list[Image.Image]], list[str]]:
    """Images -> texts, as `unit read` reads them.

    Raises:
        ValueError: ``model`` is an encoder only.
    """
    from modeling_unit import UnitConfig, UnitForConditionalGeneration, UnitProcessor
    from modeling_unit.reading_unit import Reader

    config = _read_config(model)
    if not isinstance(config, UnitConfig):
        raise ValueError(f"{model} is a {config.model_type!r} checkpoint, which cannot read; leave out the suite text")
    weights = UnitForConditionalGeneration.from_pretrained(model).eval().to(device)
    reader = Reader(weights, UnitProcessor.from_pretrained(model))
    return lambda images: [page.text for page in reader.read_many(images)]


class PictureEncoder:
    """A model as the picture suite sees it: tokens of pictures, and their embedding in the sentence encoder's space.

    Args:
        path: folder or Hub id of a full UNIT checkpoint or of an encoder, UNIT's or transformers' own. An encoder that
            was trained as a teacher has its projection to the sentence encoder's space beside it.
        device: where it runs.

    Attributes:
        resolution: side in pixels of the pictures it takes, x1.
        zero_shot: way of naming -> function of pictures to (B, 384) embeddings. ``""`` is the model's own: a full
            model's goes through the vision decoder, which is where the paper keeps recognition, an encoder's straight
            from the class token. ``"no vision decoder"`` takes a full model's class token as if it were the teacher's.
        projection: (384, D) from the class token to the sentence encoder's space, or None.
        largest: largest magnitude among all patch tokens seen so far.
    """

    def __init__(self, path: str, device: str = "cpu"):
        from modeling_unit import UnitConfig, UnitForPreTraining, UnitImageProcessor
        from modeling_unit.architectures_unit import architecture, prefix_tokens
        from modeling_unit.image_processing_unit import load_image_processor
        from modeling_unit.vision_sources_unit import find_vision_source
        from training.teacher import load_projection

        config = _read_config(path)
        self.device = device
        self.zero_shot: dict[str, Callable[[list[Image.Image]], torch.Tensor]] = {}
        self.projection: torch.Tensor | None = None
        self.largest, self._squares, self._values = 0.0, 0.0, 0
        if isinstance(config, UnitConfig):
            self.model = UnitForPreTraining.from_pretrained(path)
            if config.projection_dim:
                self.projection = self.model.visual_projection.weight.detach()
                self.zero_shot[""] = self._decoded
        else:
            found = find_vision_source(path)
            config, self.model, self.prefix = found.config, found.load(None), prefix_tokens(found.config)
            self.projection = load_projection(path)
        ours = isinstance(config, UnitConfig) or architecture(config).ours
        # transformers' own processors crop, or make patches of the pictures: ours makes of all what the table says
        self.processor = load_image_processor(path) if ours else UnitImageProcessor(**found.image_settings)
        self.resolution = _resolution(self.processor)
        width = getattr(config, "vision_config", config).hidden_size
        if self.projection is not None and self.projection.shape[1] == width:
            self.projection = self.projection.to(device)
            self.zero_shot["no vision decoder" if self.zero_shot else ""] = self._projected
        self.model.eval().to(device)

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Square RGB pictures -> (B, 3, side, side)."""
        return self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.device)

    @torch.inference_mode()
    def tokens(self, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Class token (B, D), the patches' mean where there is none, and patch tokens (B, N, D)."""
        from modeling_unit.architectures_unit import run_encoder

        pixels = self._pixels(pictures)
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

    @torch.inference_mode()
    def _decoded(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.model.get_projected_image_features(self._pixels(pictures))

    @torch.inference_mode()
    def _projected(self, pictures: list[Image.Image]) -> torch.Tensor:
        return self.tokens(pictures)[0].float() @ self.projection.float().T


def _shown(folder: Path) -> str:
    """The folder as a report names it: nobody else's home is the writer's."""
    folder, home = Path(folder), Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else str(folder)


def _resolution(processor) -> int:
    """Side in pixels of the square pictures that an image processor makes."""
    if hasattr(processor, "base_size"):
        return processor.base_size
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    for key in ("height", "shortest_edge"):
        if key in size:
            return size[key]
    raise ValueError(f"{type(processor).__name__} does not say what size of picture it makes")


def _image_suite(model: str, teacher: str | None, folder: Path, batch_size: int, device: str) -> dict:
    """The same held-out pictures through the model and, where one is named, its teacher."""
    found, notes = [], []
    for name, path in [("UNIT", model), ("teacher", teacher)]:
        if path is None:
            continue
        encoder = PictureEncoder(path, device)
        found.append({"name": name, "rows": [list(row) for row in picture_rows(encoder, folder, batch_size)]})
        # A tower with activations in the tens loses in front of a language model: RADIO, issue 15.
        size, largest = encoder.root_mean_square, encoder.largest
        notes.append(f"{name}: patch tokens have a root mean square of {size:.2f} and reach {largest:.1f}.")
    return {"pictures": _shown(folder), "models": found, "notes": notes}


def picture_rows(encoder: PictureEncoder, folder: Path, batch_size: int) -> Iterator[tuple[str, float, float, float]]:
    """(name, value, low, high) of every figure: k-NN of either kind of feature, zero-shot naming either way."""
    from training.evaluation.image import evaluate_images

    features = {
        "class token": lambda pictures: encoder.tokens(pictures)[0],
        "patch mean": lambda pictures: encoder.tokens(pictures)[1].mean(dim=1),
    }
    ways = [*encoder.zero_shot.items(), (None, None), (None, None)]  # two at most, one in either pass
    for (feature, encode), (way, embed) in zip(features.items(), ways, strict=False):
        for name, *figures in evaluate_images(encode, embed, folder, encoder.resolution, batch=batch_size):
            detail = way if name.startswith("zero_shot") else feature
            yield (f"{name}, {detail}" if detail else name, *figures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `unit evaluate`; :func:`run` takes what they parse to."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a UNIT checkpoint")
    parser.add_argument("--suite", default=",".join(SUITES), help="comma-separated: text, image (default: both)")
    parser.add_argument("--peers", default="", help="comma-separated: tesseract (default: none)")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="at most so many blocks of text, spread evenly (default: all)")
    parser.add_argument("--blocks", type=Path, help="folder of held-out blocks (default: as `unit data` builds them)")
    parser.add_argument("--pictures", type=Path, help="folder of held-out pictures (default: likewise)")
    parser.add_argument("--teacher", help="folder or Hub id of the encoder before training, for comparison")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; the exit status is 2 for bad input, after one clear line."""
    try:
        results = evaluate(
            arguments.model,
            _listed(arguments.suite),
            arguments.out,
            limit=arguments.limit,
            peers=_listed(arguments.peers),
            blocks=arguments.blocks,
            pictures=arguments.pictures,
            teacher=arguments.teacher,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
    except ValueError as error:
        print(f"unit evaluate: {error}", file=sys.stderr)
        return 2
    print(tables(results))
    print(f"\nwritten to {arguments.out}/: report.md, report.png, results.json")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`unit evaluate` on its own: ``python -m training.evaluation.run``."""
    parser = argparse.ArgumentParser(prog="unit evaluate", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
