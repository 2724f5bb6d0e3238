"""`unit data push`: a data set to a Hub on loopback, and back through `datasets` where none of our code is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, HfApi
from PIL import Image

pytest.importorskip("pyarrow")

from training import publish_data as module
from training.data.schema import make_row, write_shards
from training.publish import PublishError
from training.publish_data import publish_data
from unit_cli.__main__ import main

SAMPLES = Path(__file__).resolve().parents[1] / "spaces_demo" / "samples"


def page(index, split="train", **changes):
    pixels = np.random.default_rng([index, split == "train"]).integers(0, 256, size=(20, 30), dtype=np.uint8)
    row = {"task": "ocr", "kind": "document", "source": f"made-pages/dense/{split}#{index}", "license": "Apache-2.0"}
    text = changes.pop("text", f"{split} number {index} | <b>")
    return make_row(pixels, text, **{**row, "split": split, **changes})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Seven rows to train on, in three shards, with a manifest; two to validate, with a report."""
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    train, validation = tmp_path / "dots-train", tmp_path / "dots-validation"
    rows = [page(index) for index in range(6)]
    rows.append(page(6, source="npm openmoji@17.0.0", license="CC-BY-SA-4.0"))
    write_shards(rows, train, 3)
    write_shards([page(index, "validation") for index in range(2)], validation)
    plan = {"kind": "dense", "count": 7, "shard_rows": 3, "seed": 11, "split": "train", "settings": {}, "code": "v 1"}
    (train / "manifest.json").write_text(json.dumps(plan))
    report = {"settings": {"seed": 5, "documents": str(Path.home() / "private" / "list.txt")}}
    (validation / "report.json").write_text(json.dumps(report))
    return [train, validation]


@pytest.fixture
def client(online, monkeypatch):
    api = HfApi(endpoint=online.endpoint, token=online.token)
    monkeypatch.setattr(module, "_api", lambda: api)
    return api


LOADED_BY_A_STRANGER = """
import json, sys
from datasets import load_dataset
whole = load_dataset("alice/dots")
streamed = {split: list(rows) for split, rows in load_dataset("alice/dots", streaming=True).items()}
told = {}
for split, rows in whole.items():
    assert [row["text"] for row in rows] == [row["text"] for row in streamed[split]]
    assert [row["image"].tobytes() for row in rows] == [row["image"].tobytes() for row in streamed[split]]
    told[split] = [[row["text"], row["source"], row["license"], list(row["image"].size)] for row in rows]
assert "training" not in sys.modules
print(json.dumps(told))
"""


def test_load_dataset_gives_back_what_was_pushed(client, online, folders, tmp_path):
    done = publish_data(folders, "alice/dots")
    assert done.commit == online.head("alice/dots", kind="datasets")
    result = online.python(LOADED_BY_A_STRANGER, cwd=tmp_path, token=None)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert [row[0] for row in told["train"]] == [f"train number {index} | <b>" for index in range(7)]
    assert told["train"][6][1:] == ["npm openmoji@17.0.0", "CC-BY-SA-4.0", [30, 20]]
    assert len(told["validation"]) == 2
    assert not online.uncovered
    assert not online.leaks()


def test_the_card_says_what_lies_there(client, online, folders):
    publish_data(folders, "alice/dots", private=True)
    files = online.files("alice/dots", kind="datasets")
    card = DatasetCard(files["README.md"].decode())
    info = card.data.to_dict()["dataset_info"]
    shards = {name: len(content) for name, content in files.items() if name.endswith(".parquet")}
    assert {one["name"]: one["num_examples"] for one in info["splits"]} == {"train": 7, "validation": 2}
    assert info["download_size"] == sum(shards.values())
    assert len(shards) == 4
    assert card.data.license == ["apache-2.0", "cc-by-sa-4.0"]
    assert card.data.size_categories == ["n<1K"]
    text = card.text
    assert "| made-pages | Apache-2.0 | 8 |" in text  # six to train on, two to validate
    assert "| npm openmoji@17.0.0 | CC-BY-SA-4.0 | 1 |" in text
    assert "unit data generate dense --count 7 --shard-rows 3 --seed 11 --split train" in text
    assert "do not train on it" in text
    assert str(Path.home()) not in text + files["made/dots-validation.json"].decode()
    assert "~/private/list.txt" in files["made/dots-validation.json"].decode()
    assert r"number 1 \| &lt;b>" in text
    pictures = [name for name in files if name.startswith("examples/")]
    assert len(pictures) == 5  # three of train, both of validation
    assert all(f"]({name})" in text for name in pictures)
    assert client.dataset_info("alice/dots").private


def test_licences_are_named_as_the_hub_names_them():
    assert module._hub_licenses({"Apache-2.0 (drawn by this project)"}) == "apache-2.0"
    names = {"Apache-2.0 (drawn by this project); picture: GPL-3.0-or-later; picture: MIT", "public domain"}
    assert module._hub_licenses(names) == ["apache-2.0", "gpl-3.0", "mit", "other"]


def test_an_unchanged_set_uploads_nothing_and_a_smaller_one_takes_shards_away(client, online, folders, capsys):
    publish_data(folders, "alice/dots")
    before, head = len(online.requests), online.head("alice/dots", kind="datasets")
    assert main(["data", "push", *map(str, folders), "alice/dots"]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    sent = [one for one in online.requests[before:] if one.method in ("POST", "PUT")]
    assert {one.route for one in sent} <= {"/api/validate-yaml"}
    assert online.head("alice/dots", kind="datasets") == head
    client.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="alice/dots", repo_type="dataset")
    write_shards([page(0)], folders[0])
    changed = publish_data(folders, "alice/dots").uploaded
    assert "data/train-00000-of-00001.parquet" in changed
    assert "data/train-00002-of-00003.parquet" in changed  # taken away
    files = online.files("alice/dots", kind="datasets")
    assert [name for name in files if name.startswith("data/train")] == ["data/train-00000-of-00001.parquet"]
    assert files["notes.txt"] == b"mine"


def test_a_card_edited_on_the_hub_is_kept_and_said(client, online, folders, capsys):
    publish_data(folders, "alice/dots")
    ours = online.files("alice/dots", kind="datasets")["README.md"]
    put = {"path_in_repo": "README.md", "repo_id": "alice/dots", "repo_type": "dataset"}
    client.upload_file(path_or_fileobj=ours + b"\nMy words.\n", **put)
    assert main(["data", "push", *map(str, folders), "alice/dots"]) == 0
    assert "README.md was edited on the Hub and is kept as it is there; --overwrite-card" in capsys.readouterr().out
    assert online.files("alice/dots", kind="datasets")["README.md"] == ours + b"\nMy words.\n"
    assert main(["data", "push", *map(str, folders), "alice/dots", "--overwrite-card"]) == 0
    assert online.files("alice/dots", kind="datasets")["README.md"] == ours


def test_a_pull_request_and_a_branch_leave_the_branch(client, online, folders):
    publish_data(folders, "alice/dots")
    head = online.head("alice/dots", kind="datasets")
    write_shards([page(0)], folders[0])
    assert publish_data(folders, "alice/dots", create_pr=True).url.endswith("/discussions/1")
    publish_data(folders, "alice/dots", revision="small")
    assert online.head("alice/dots", kind="datasets") == head
    for ref in ("refs/pr/1", "small"):
        assert "data/train-00000-of-00001.parquet" in online.files("alice/dots", ref, kind="datasets")


def test_a_dry_run_leaves_the_files_without_network(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["data", "push", *map(str, folders), "alice/dots", "--dry-run"]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    (written,) = tmp_path.glob("unit-data-*/dataset")
    assert DatasetCard.load(written / "README.md").data.pretty_name == "dots"
    shard = written / "data" / "train-00000-of-00003.parquet"
    assert shard.read_bytes() == (folders[0] / "part-00000.parquet").read_bytes()


def _demo_row():
    with Image.open(SAMPLES / "pictures" / "dog.jpg") as picture:
        small = np.asarray(picture.convert("RGB").resize((200, 140)))
    row = {"task": "caption", "kind": "natural", "source": "deb somewhere", "license": "MIT", "split": "train"}
    return make_row(small, "a dog", **row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (page(9, source="texlive-humanities-doc/a.pdf#1"), "from a held-out package"),
        (page(9, source="made-pages/dense/0#9 (Vollkorn)"), "held-out font"),
        (page(9, text="validation number 1 is a line of text that both have"), "shares text"),
        (_demo_row(), "looks like dog.jpg"),
        (page(9, license="", text="hf_" + "a1B2" * 8), "looks like a token"),
        (page(9, "validation"), "among rows of 'train'"),
    ],
)
def test_what_must_not_be_published_is_one_line(client, online, folders, capsys, row, said):
    write_shards([page(0), row], folders[0])
    both = page(1, "validation", text="Validation number 1, is a line of text that both have.")
    write_shards([page(0, "validation"), both], folders[1])
    assert main(["data", "push", *map(str, folders), "alice/dots"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert "hf_a1B2" not in lines[-1]
    assert online.repository("datasets", "alice/dots") is None


def test_folders_that_are_no_data_set_are_refused(client, folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folders[0], unfinished)
    (unfinished / "manifest.json").unlink()
    (unfinished / ".generate").mkdir()
    other = tmp_path / "other"
    write_shards([page(0)], other)
    import pyarrow.parquet as pq

    table = pq.read_table(other / "part-00000.parquet")
    pq.write_table(table.drop_columns(["license"]), other / "part-00000.parquet")
    for wrong, said in (
        ([tmp_path / "empty"], "holds no parquet files"),
        ([unfinished], "not finished"),
        ([folders[0], other], "other columns than the first shard's: license"),
        ([tmp_path / "gone"], "holds no parquet files"),
    ):
        with pytest.raises(PublishError, match=said):
            publish_data(wrong, "alice/dots")


def test_who_may_not_write_is_told_so_before_a_row_is_read(online, folders, monkeypatch):
    from hub_server import ALICE_READ_ONLY, BOB

    monkeypatch.setattr(module, "read_splits", None)
    for token, said in ((BOB, "no right to make"), (ALICE_READ_ONLY, "may only read")):
        with pytest.raises(PublishError, match=said) as error:
            publish_data(folders, "alice/dots", api=HfApi(endpoint=online.endpoint, token=token))
        assert token not in str(error.value)
