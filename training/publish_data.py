"""A data set to the Hugging Face Hub: `unit data push`. Shards of the schema and a card, in one commit.

    publish_data(["made-train", "made-validation"], "me/made-pages")

Every row is looked at before: it must be of the schema, hold no token, and, where it is for training, nothing that is
held out. The card is filled from the rows and from what the builders left beside them (``manifest.json``,
``report.json``). `load_dataset(repo_id)` reads the repository without code of ours.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data.generate import MANIFEST, STATE, source_group
from .data.heldout import LeakCheck, validation_text_filter, validation_text_path
from .data.schema import SPLITS, shard_paths, validate_row
from .publish import (
    README,
    TOKEN,
    Published,
    PublishError,
    _api,
    _without_home,
    check_access,
    check_repo_id,
    explained,
    hand_over,
    workplace,
)

TEMPLATE = Path(__file__).with_name("data_card.md.jinja")
# What an earlier push may have left
OWN_FILES = re.compile(r"^(data/(train|validation)-[\d-]+of-\d+\.parquet|examples/\d+\.\w+|made/.*\.json)$")
EXAMPLES = 3  # pictures on the card, of each split
_LICENSES = "apache-2.0 mit cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 gpl-2.0 gpl-3.0 lppl-1.3c"
HUB_LICENSES = frozenset(_LICENSES.split())
MEANINGS = {
    "image": "the picture",
    "text": "the target, with `\\n` between printed lines",
    "task": "`ocr`, `caption` or `markdown`",
    "kind": "`natural` or `document`",
    "source": "where the row comes from",
    "license": "licence of the source, as far as known",
    "split": "`train` or `validation`",
    "words": "words with their boxes `[x0, y0, x1, y1]`, pixels, ends exclusive",
    "char_boxes": "the same four numbers for each character of `text`, end to end; zeros for white space",
    "x_height": "height of a lower-case x, pixels; 0 where there is none",
}


@dataclass
class Split:
    """What one split of the set holds."""

    name: str
    folders: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    rows: int = 0
    characters: int = 0
    bytes: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    sources: Counter = field(default_factory=Counter)  # (source group, licence)

    @property
    def files(self) -> int:
        return len(self.shards)


def publish_data(
    folders: list[str | Path],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    overwrite_card: bool = False,
    api: Any = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Published:
    """Publish folders of shards as one data set.

    Args:
        folders: of parquet shards of the schema with equal columns; each holds rows of one split.
        repo_id: `OWNER/NAME`; made when it does not exist.
        private, create_pr, revision, overwrite_card, api, say: as of `publish`.
        dry_run: do all but upload, without network; the folder is left and named in the result.
        progress: show a bar over the rows.

    Raises:
        PublishError: a folder that is unfinished, or not of the schema; training rows with something held out; a
            token in a text; no token or no right, no connection, a race with another push. The branch is as it was.
    """
    from huggingface_hub import DatasetCard

    check_repo_id(repo_id)
    if not dry_run:
        api = api or _api()
        with explained(repo_id, api):
            check_access(api, repo_id, private, create_pr, repo_type="dataset")
    try:
        splits, features = read_splits([Path(folder) for folder in folders], progress, say)
    except (ValueError, OSError) as error:
        raise PublishError(str(error)) from error
    with workplace("unit-data-", dry_run) as work:
        folder = work / "dataset"
        write_repository(folder, repo_id, splits, features)
        if not dry_run:
            with explained(repo_id, api):
                DatasetCard((folder / README).read_text(encoding="utf-8")).validate()
        where = {"private": private, "create_pr": create_pr, "revision": revision}
        where |= {"repo_type": "dataset", "own_files": OWN_FILES, "overwrite_card": overwrite_card}
        return hand_over(folder, repo_id, api, dry_run, say, "the data set ", **where)


# -- what is published --------------------------------------------------------------------------------------------


def read_splits(folders: list[Path], progress: bool, say: Callable[[str], None]) -> tuple[list[Split], Any]:
    """Look at every row; the splits in the order of the schema, and the columns as `datasets.Features`.

    Raises:
        ValueError: what `publish_data` says of folders, rows and leaks.
    """
    import pyarrow.parquet as pq
    from datasets import Features

    found = {name: Split(name) for name in SPLITS}
    features: Any = None
    for folder in folders:
        if (folder / STATE).is_dir() and not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder}: not finished (no {MANIFEST}); give the command that began it again")
        shards = shard_paths(folder)
        name = _split_of(shards[0])
        found[name].folders.append(folder)
        found[name].shards += shards
        for shard in shards:
            columns = Features.from_arrow_schema(pq.read_schema(shard))
            if features is not None and columns != features:
                other = {key for key in columns.keys() | features.keys() if columns.get(key) != features.get(key)}
                raise ValueError(f"{shard}: other columns than the first shard's: {', '.join(sorted(other))}")
            features = columns
    marks = validation_text_filter().marks if validation_text_path().is_file() else frozenset()
    check = LeakCheck(marks)
    for name in reversed(SPLITS):  # validation first: what training is compared with
        split = found[name]
        if split.shards:
            say(f"looking at {split.files} shards of {name}")
        total = sum(pq.read_metadata(shard).num_rows for shard in split.shards)
        wanted = {total * (2 * place + 1) // (2 * EXAMPLES) for place in range(EXAMPLES)}
        for row in _bar(_rows(split.shards), total, name, progress):
            validate_row(row, decode=False)
            if row["split"] != name:
                raise ValueError(f"{row['source']}: of split {row['split']!r} among rows of {name!r}")
            if TOKEN.search(f"{row['text']} {row['source']}".encode()):
                raise ValueError(f"{row['source']}: holds what looks like a token of the Hub; take it out first")
            leak = check.leak_of(row) if name == "train" else check.hold_out(row)
            if leak:
                raise ValueError(
                    f"held out, and yet to be trained on: {leak}. `unit data check-leaks` lists all such rows; build "
                    "the set again without them (from-pdfs: --leave-out-held-out)"
                )
            if split.rows in wanted:
                split.examples.append(row)
            split.rows += 1
            split.characters += len(row["text"])
            split.sources[source_group(row["source"]), row["license"]] += 1
        split.bytes = sum(shard.stat().st_size for shard in split.shards)
    return [split for split in found.values() if split.shards], features


def _bar(rows: Iterator, total: int, name: str, progress: bool) -> Iterator:
    from tqdm import tqdm

    return tqdm(rows, total=total, desc=name, unit=" rows", disable=not progress, mininterval=2.0)


def _split_of(shard: Path) -> str:
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        if "split" not in file.schema_arrow.names:
            raise ValueError(f"{shard}: not of the schema (no column split); see docs/data.md")
        for batch in file.iter_batches(batch_size=1, columns=["split"]):
            if (name := batch.column(0)[0].as_py()) in SPLITS:
                return name
            raise ValueError(f"{shard}: split must be one of {', '.join(SPLITS)}, not {name!r}")
    raise ValueError(f"{shard}: holds no rows")


def _rows(shards: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for shard in shards:
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(batch_size=128):
                yield from batch.to_pylist()


def write_repository(folder: Path, repo_id: str, splits: list[Split], features: Any) -> None:
    """Write into `folder`, which is made, what the repository holds; shards are links to where they are."""
    for part in ("data", "examples", "made"):
        (folder / part).mkdir(parents=True)
    for split in splits:
        for place, shard in enumerate(split.shards):
            name = f"{split.name}-{place:05d}-of-{split.files:05d}.parquet"
            (folder / "data" / name).symlink_to(shard.resolve())
        for origin in split.folders:
            for name in (MANIFEST, "report.json"):
                if (origin / name).is_file():
                    content = json.loads((origin / name).read_text(encoding="utf-8"))
                    text = json.dumps(_without_home(content), indent=1, ensure_ascii=False) + "\n"
                    (folder / "made" / f"{origin.resolve().name}.json").write_text(text, encoding="utf-8")
    examples = [row for split in splits for row in split.examples]
    for place, row in enumerate(examples):
        row["picture"] = f"examples/{place}.{_suffix(row['image']['bytes'])}"
        (folder / row["picture"]).write_bytes(row["image"]["bytes"])
    (folder / README).write_text(make_data_card(repo_id, splits, features, examples), encoding="utf-8")


def _suffix(content: bytes) -> str:
    return "png" if content[:4] == b"\x89PNG" else "webp" if content[8:12] == b"WEBP" else "jpg"


# -- the card -----------------------------------------------------------------------------------------------------


def make_data_card(repo_id: str, splits: list[Split], features: Any, examples: list[dict[str, Any]]) -> str:
    """The card: front matter that `datasets` and the Hub read, then what a person wants to know."""
    import jinja2
    from huggingface_hub import DatasetCardData

    counts: Counter = sum((split.sources for split in splits), Counter())
    sources = [
        {"source": a, "license": b, "rows": n} for (a, b), n in sorted(counts.items(), key=lambda c: (-c[1], c))
    ]
    rows = sum(split.rows for split in splits)
    tasks = sorted({row["task"] for row in examples})
    card_data = DatasetCardData(
        license=_hub_licenses({license for _, license in counts}),
        task_categories=["image-to-text"],
        tags=["unit", "ocr", *(task for task in tasks if task != "ocr")],
        pretty_name=repo_id.split("/")[1],
        size_categories=[_size_category(rows)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": each.name, "path": f"data/{each.name}-*"} for each in splits],
            }
        ],
        dataset_info={
            "features": features._to_yaml_list(),
            "splits": [{"name": one.name, "num_bytes": one.bytes, "num_examples": one.rows} for one in splits],
            "download_size": sum(split.bytes for split in splits),
            "dataset_size": sum(split.bytes for split in splits),
        },
    )
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=card_data.to_yaml().rstrip(),
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        summary=f"{rows:,} pictures with what is to be said of them ({', '.join(tasks)}), in the schema of UNIT, one "
        "vision encoder that recognises pictures and reads text.",
        splits=splits,
        held_out=_held_out_statement(splits),
        examples=[
            {
                "picture": row["picture"],
                "task": row["task"],
                "text": _cell(row["text"]),
                "source": _cell(row["source"]),
            }
            for row in examples
        ],
        columns=[{"name": key, "type": _type_of(features[key]), "meaning": MEANINGS.get(key, "")} for key in features],
        sources=[{**each, "source": _cell(each["source"]), "license": _cell(each["license"])} for each in sources],
        made=[how_made(origin) for split in splits for origin in split.folders],
    )
    return re.sub(r"\n{3,}", "\n\n", content)


def _held_out_statement(splits: list[Split]) -> str:
    names = [split.name for split in splits]
    said = []
    if "validation" in names:
        said.append("**The validation split is held out: do not train on it.**")
    if "train" in names:
        said.append(
            "Every row of the training split was compared with what UNIT holds out for validation (`unit data "
            "check-leaks`; the list is `training/data/heldout.yaml`): none comes from a held-out package or is drawn "
            "in a held-out font, and no picture is, or looks like, one of the demo's"
            + (" or of the validation split's, and no text is shared with it." if "validation" in names else ".")
        )
    return " ".join(said)


def _hub_licenses(names: set[str]) -> list[str] | str:
    """Identifiers that the Hub knows; "other" for what has none there."""
    known = set()
    for part in (part for name in names for part in name.split(";")):  # of a page, and of the pictures on it
        plain = part.strip().removeprefix("picture: ").split(" (")[0].lower()
        plain = plain.removesuffix("-or-later").removesuffix("-only")
        known.add(plain if plain in HUB_LICENSES else "other")
    found = sorted(known, key=lambda name: (name == "other", name))
    return found[0] if len(found) == 1 else found


def _size_category(rows: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    return next((name for power, name in enumerate(names, 3) if rows < 10**power), "1B<n<10B")


def _type_of(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    if hasattr(feature, "feature"):
        inner = feature.feature
        if isinstance(inner, dict):
            return "list of {" + ", ".join(f"{key}: {_type_of(value)}" for key, value in inner.items()) + "}"
        return f"list of {_type_of(inner)}"
    return "image" if type(feature).__name__ == "Image" else str(dtype)


def _cell(text: str, most: int = 160) -> str:
    """Text as a cell of a Markdown table: nothing in it is markup."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return "<br>".join(text.split("\n")) or "(nothing to read)"


def how_made(folder: Path) -> dict[str, str]:
    """What the builder left in a folder, for the card: name, code, text and the command."""
    name = folder.resolve().name
    if (folder / MANIFEST).is_file():
        plan = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        what, text = plan["kind"], f"Row k is a function of the seed {plan['seed']} and k alone."
        if plan["settings"]:
            recipe = json.dumps({"kind": plan["kind"], "settings": plan["settings"]}, ensure_ascii=False)
            what, text = "recipe.yaml", f"{text} `recipe.yaml` says `{recipe}`."
        command = f"unit data generate {what} --count {plan['count']} --shard-rows {plan['shard_rows']}"
        command += f" --seed {plan['seed']} --split {plan['split']} --out {name}"
        return {"name": name, "code": plan["code"], "text": text, "command": command}
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        settings = _without_home(report.get("settings") or {"seed": report.get("seed")})
        text = f"Settings: `{json.dumps(settings, ensure_ascii=False)}`. The whole report is `made/{name}.json`."
        return {"name": name, "code": "", "text": text, "command": str(report.get("command") or "")}
    return {"name": name, "code": "", "text": "The builder left no report.", "command": ""}
