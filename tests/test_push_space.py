"""`unit push-space`: the demo's files to a Space on loopback, and its app built from what lies there."""

import json
import sys
from pathlib import Path

import pytest
import tiny
from huggingface_hub import HfApi, SpaceCard

from training import publish_space as spaces
from training.card import with_app_settings
from training.publish import PublishError, upload
from training.publish_space import publish_space
from unit_cli.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def client(online, monkeypatch, tmp_path):
    """Of a Hub that has a full model and one without weights."""
    api = HfApi(endpoint=online.endpoint, token=online.token)
    monkeypatch.setattr(spaces, "_api", lambda: api)
    tiny.unit_model().save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    upload(tmp_path / "model", "alice/unit", api)
    api.create_repo("alice/empty")
    return api


@pytest.fixture
def unchecked(monkeypatch):
    """For tests of what comes before and after the check, which takes seconds."""
    monkeypatch.setattr(spaces, "check_space", lambda *_: [])


BUILT_BY_A_SPACE = """
import runpy, sys, os
from pathlib import Path
root, model = Path(sys.argv[1]), sys.argv[2]
sys.path[:] = [path for path in sys.path if path not in ("", sys.argv[3])]
module = runpy.run_path(str(root / "spaces_demo" / "app.py"), run_name="app")
module["build"]()
import spaces_demo.inference, modeling_unit
for loaded in (spaces_demo.inference, modeling_unit):
    assert Path(loaded.__file__).is_relative_to(root), loaded.__file__
demo = spaces_demo.inference.Demo.load()
assert demo.name == Path(model).name, demo.name
assert all(path.is_file() for path in module["PAGES"] + module["PICTURES"])
from spaces_demo.sample_run import word_f1
assert word_f1("a b", "b a") == 1
print("built")
"""


def test_the_app_is_built_from_what_lies_in_the_space(client, online, tmp_path):
    pytest.importorskip("gradio")
    done = publish_space("alice/demo", "alice/unit")
    assert done.commit == online.head("alice/demo", kind="spaces")
    files = online.files("alice/demo", kind="spaces")
    assert set(files) == set(done.files) | {".gitattributes"}
    assert not [name for name in files if "checkpoints" in name or name.endswith((".safetensors", ".pyc"))]
    card = SpaceCard(files["README.md"].decode()).data
    assert card.sdk == "gradio"
    assert card.models == ["alice/unit"]
    assert card.app_file in files
    assert b'Client("alice/demo")' in files["README.md"]
    assert files["requirements.txt"] == (ROOT / "spaces_demo" / "requirements.txt").read_bytes()
    assert client.get_space_variables("alice/demo")["UNIT_MODEL_ID"].value == "alice/unit"
    assert not online.leaks()
    root = client.snapshot_download("alice/demo", repo_type="space", local_dir=tmp_path / "space")
    model = str(tmp_path / "model")
    command = [sys.executable, "-I", "-c", BUILT_BY_A_SPACE, root, model, str(ROOT)]
    made = online.run(command, cwd=tmp_path, env={"UNIT_MODEL_ID": model}, token=None)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip().endswith("built")


def test_an_unchanged_space_is_left_alone_and_another_model_is_named(unchecked, client, online, capsys):
    publish_space("alice/demo", "alice/unit", private=True)
    assert client.space_info("alice/demo").private
    before, head = len(online.requests), online.head("alice/demo", kind="spaces")
    assert main(["push-space", "alice/demo", "--model", "alice/unit"]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    assert not [one for one in online.requests[before:] if one.method in ("POST", "PUT")]
    client.delete_space_variable("alice/demo", "UNIT_MODEL_ID")
    client.upload_file(path_or_fileobj=b"old", path_in_repo="unit_cli/old.py", repo_id="alice/demo", repo_type="space")
    client.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="alice/demo", repo_type="space")
    assert publish_space("alice/demo", "alice/unit").uploaded == ["unit_cli/old.py"]
    assert client.get_space_variables("alice/demo")["UNIT_MODEL_ID"].value == "alice/unit"
    assert "notes.txt" in online.files("alice/demo", kind="spaces")
    assert online.head("alice/demo", kind="spaces") != head


def test_a_pull_request_leaves_the_variable_and_the_branch(unchecked, client, online):
    said = []
    client.create_repo("alice/demo", repo_type="space", space_sdk="gradio")
    head = online.head("alice/demo", kind="spaces")
    done = publish_space("alice/demo", "alice/unit", create_pr=True, say=said.append)
    assert online.head("alice/demo", kind="spaces") == head
    assert "spaces_demo/app.py" in online.files("alice/demo", "refs/pr/1", kind="spaces")
    assert done.url.endswith("/discussions/1")
    assert not client.get_space_variables("alice/demo")
    assert any("UNIT_MODEL_ID" in line for line in said)


BEGUN_BY_THE_HUB = """---
title: Demo
emoji: 🐠
sdk: gradio
sdk_version: 4.0.0
app_file: app.py
---

Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference
"""


def test_a_readme_edited_on_the_hub_is_kept_and_still_starts_the_app(unchecked, client, online, capsys):
    """The Hub's own first page is replaced; a person's words stay, with the settings that this app needs."""

    def put(text):
        client.upload_file(
            path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/demo", repo_type="space"
        )

    def there():
        return online.files("alice/demo", kind="spaces")["README.md"].decode()

    client.create_repo("alice/demo", repo_type="space", space_sdk="gradio")
    put(BEGUN_BY_THE_HUB)
    publish_space("alice/demo", "alice/unit")
    first = there()
    assert "Look inside" in first
    assert SpaceCard(first).data.app_file == "spaces_demo/app.py"

    put(first.replace("title: UNIT", "title: My reader").replace("one page at a time", "my words"))
    mine = there()
    assert main(["push-space", "alice/demo", "--model", "alice/unit"]) == 0
    assert "README.md was edited on the Hub and is kept as it is there; --overwrite-card" in capsys.readouterr().out
    assert there() == mine

    pinned = SpaceCard(first).data.sdk_version
    put(mine.replace(f"sdk_version: {pinned}", "sdk_version: 5.0.0"))
    assert main(["push-space", "alice/demo", "--model", "alice/unit"]) == 0
    assert "kept as it is there, but for the settings that start the app" in capsys.readouterr().out
    card = SpaceCard(there())
    assert (card.data.title, card.data.sdk_version) == ("My reader", pinned)
    assert card.text.strip() == SpaceCard(mine).text.strip()

    with pytest.raises(ValueError, match="front matter cannot be read"):
        with_app_settings(mine.replace("title: My reader", "title: [my"), first)

    assert main(["push-space", "alice/demo", "--model", "alice/unit", "--overwrite-card"]) == 0
    assert there() == first


def test_a_private_model_needs_a_secret(unchecked, client):
    said = []
    client.update_repo_settings("alice/unit", private=True)
    publish_space("alice/demo", "alice/unit", say=said.append)
    assert any("secret HF_TOKEN" in line for line in said)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("alice/gone", "no such model"),
        ("alice/empty", "has no weights"),
        ("alice/encoder", "needs a full UNIT model"),
        ("gone", "name the owner too"),
    ],
)
def test_a_model_that_the_space_cannot_use_is_refused(client, online, tmp_path, capsys, model, said):
    tiny.unit_model().vision_model.save_pretrained(tmp_path / "encoder")
    upload(tmp_path / "encoder", "alice/encoder", client)
    capsys.readouterr()  # bars of the above
    assert main(["push-space", "alice/demo", "--model", model]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert online.repository("spaces", "alice/demo") is None


def broken(monkeypatch, path: str, change) -> None:
    """From now on a Space's file differs from ours."""
    write = spaces.write_space

    def write_broken(folder, *names):
        write(folder, *names)
        (folder / path).write_text(change((folder / path).read_text(encoding="utf-8")), encoding="utf-8")

    monkeypatch.setattr(spaces, "write_space", write_broken)


@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("spaces_demo/limits.py", lambda text: text.replace("QUEUE", "LINE"), "cannot import name 'QUEUE'"),
        (
            "spaces_demo/app.py",
            lambda text: text.replace('"api_name": "scales"', '"api_name": "s"'),
            "endpoint /scales",
        ),
    ],
)
def test_an_app_that_does_not_start_from_its_files_is_not_uploaded(
    client, online, monkeypatch, capsys, tmp_path, path, change, said
):
    pytest.importorskip("gradio")
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    broken(monkeypatch, path, change)
    assert main(["push-space", "alice/demo", "--model", "alice/unit"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("unit push-space: the app ")
    assert said in last
    assert online.repository("spaces", "alice/demo") is None
    assert list((tmp_path / "work").iterdir()) == []


def test_a_file_that_is_left_out_is_not_taken_from_this_package(client, online, monkeypatch):
    pytest.importorskip("gradio")
    write = spaces.write_space

    def write_less(folder, *names):
        write(folder, *names)
        (folder / "unit_cli" / "inputs.py").unlink()

    monkeypatch.setattr(spaces, "write_space", write_less)
    with pytest.raises(PublishError, match=r"unit_cli\.inputs"):
        publish_space("alice/demo", "alice/unit")
    assert online.repository("spaces", "alice/demo") is None


def test_another_branch_leaves_the_default_one_and_the_variable(unchecked, client, online, capsys):
    publish_space("alice/demo", "alice/unit")
    client.delete_space_variable("alice/demo", "UNIT_MODEL_ID")
    client.delete_file("README.md", "alice/demo", repo_type="space")
    head = online.head("alice/demo", kind="spaces")
    assert main(["push-space", "alice/demo", "--model", "alice/unit", "--revision", "next"]) == 0
    assert "UNIT_MODEL_ID of alice/demo is left as it is" in capsys.readouterr().err
    assert online.head("alice/demo", kind="spaces") == head
    assert "README.md" in online.files("alice/demo", "next", kind="spaces")
    assert not client.get_space_variables("alice/demo")
    assert main(["push-space", "alice/demo", "--model", "alice/unit", "--revision", "next", "--create-pr"]) == 2
    assert "leave out --revision" in capsys.readouterr().err


def test_who_may_not_write_is_refused(unchecked, client, online, monkeypatch):
    from hub_server import ALICE_READ_ONLY, BOB

    publish_space("alice/demo", "alice/unit")
    for token, said in ((BOB, "no right to write"), (ALICE_READ_ONLY, "may only read")):
        with pytest.raises(PublishError, match=said):
            publish_space("alice/demo", "alice/unit", api=HfApi(endpoint=online.endpoint, token=token))


def test_a_dry_run_leaves_the_files_without_network_and_names_versions_that_differ(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken(monkeypatch, "requirements.txt", lambda text: text.replace("tqdm==", "tqdm==0.") + "no-such-thing==1.0\n")
    assert main(["push-space", "alice/demo", "--model", "alice/unit", "--dry-run"]) == 0
    said, told = capsys.readouterr()
    (line,) = [line for line in told.splitlines() if "other versions" in line]
    assert "instead of 0.4" in line
    assert "no-such-thing none instead of 1.0" in line
    assert [path.name for path in tmp_path.glob("unit-space-*/*")] == ["space"]
    assert "nothing was uploaded" in said
    assert "spaces_demo/app.py" in said
    (space,) = tmp_path.glob("unit-space-*/space")
    assert (space / "unit_cli" / "inputs.py").is_file()
    assert (space / "training" / "data" / "text.py").is_file()
    assert not (space / "training" / "trainer.py").exists()
    assert json.dumps(str(ROOT)) not in (space / "README.md").read_text()
