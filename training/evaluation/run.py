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

from PIL import Image

from training.data.sources import data_folder
from training.evaluation.report import machine, tables, write_report
from training.evaluation.subjects import PictureEncoder, read_config

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

    config = read_config(model)
    if not isinstance(config, UnitConfig):
        raise ValueError(f"{model} is a {config.model_type!r} checkpoint, which cannot read; leave out the suite text")
    weights = UnitForConditionalGeneration.from_pretrained(model).eval().to(device)
    reader = Reader(weights, UnitProcessor.from_pretrained(model))
    return lambda images: [page.text for page in reader.read_many(images)]


def _shown(folder: Path) -> str:
    """The folder as a report names it: nobody else's home is the writer's."""
    folder, home = Path(folder), Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else str(folder)


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
