"""`unit push --adapter`: an adapter to a Hub on loopback and back, and the merged model beside it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining

from training import publish as publishing
from training import publish_adapter as adapters
from training.adapter import base_of, fingerprint, merge_adapter, other_base, save_adapter
from training.arguments import LoraArguments
from training.lora import add_lora
from training.publish import ExportDiffers, publish, upload
from training.publish_adapter import publish_adapter
from unit_cli.__main__ import main

CLOSE = {"atol": 1e-5, "rtol": 0}  # one matrix in place of two rounds otherwise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base, a run's folder with an adapter that does something, and what the two give together."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    tiny.unit_model(text=tiny.QWEN3).save_pretrained(root / "base")
    tiny.processor().save_pretrained(root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A model\n")
    model = AutoModelForPreTraining.from_pretrained(root / "base")
    settings = {"parts": ["encoder", "language_decoder"], "r": 2, "alpha": 4, "dropout": 0.0}
    wrapped = add_lora(model, LoraArguments(**settings)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(wrapped, root / "run" / "adapter", *base_of(root / "base"))
    recipe = {
        "stage": "intra_scale",
        "start": str(Path.home() / "base"),
        "training": {"hub_model_id": "a/b", "seed": 1},
    }
    (root / "run" / "recipe.json").write_text(json.dumps(recipe))
    inputs = dict(tiny.processor()(images=tiny.noise(40, 30), task="ocr"))
    with torch.no_grad():
        logits = wrapped(**inputs).logits
    return SimpleNamespace(base=root / "base", folder=root / "run", inputs=inputs, logits=logits)


def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


LOADED_BY_A_STRANGER = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForPreTraining
inputs, out, base, adapter, merged = sys.argv[1:]
load = lambda name, sha: AutoModelForPreTraining.from_pretrained(name, revision=sha, trust_remote_code=True).eval()
inputs = load_file(inputs)
with torch.no_grad():
    found = {"merged": load("alice/merged", merged)(**inputs).logits}
    model = PeftModel.from_pretrained(load("alice/base", base), "alice/adapter", revision=adapter)
    found["adapter"] = model.eval()(**inputs).logits
assert "modeling_unit" not in sys.modules
save_file(found, out)
"""


def test_adapter_merged_model_and_merged_then_pushed_model_are_one(online, run, tmp_path, monkeypatch):
    """All three from a fresh cache in a clean process, by `repo_id` and `revision`."""
    client = api(online)
    based = upload(run.base, "alice/base", client)
    first = publish_adapter(run.folder, "alice/adapter", base="alice/base", api=client)
    assert first.commit == online.head("alice/adapter")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "recipe.json"}
    assert set(first.files) == files
    assert set(online.files("alice/adapter")) == set(first.files) | {".gitattributes"}
    before = len(online.requests)
    assert publish_adapter(run.folder, "alice/adapter", base="alice/base", api=client).uploaded == []
    assert not [one for one in online.requests[before:] if one.method in ("POST", "PUT")]

    merge_adapter(run.folder / "adapter", tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForPreTraining.from_pretrained(tmp_path / "merged").eval()(**run.inputs).logits
    monkeypatch.setattr(publishing, "check_export", lambda *rest: None)  # test_push.py has it
    pushed = publish(tmp_path / "merged", "alice/merged", api=client)

    save_file({name: tensor.contiguous() for name, tensor in run.inputs.items()}, tmp_path / "inputs.safetensors")
    words = [tmp_path / "inputs.safetensors", tmp_path / "found", based.commit, first.commit, pushed.commit]
    done = online.run([sys.executable, "-I", "-c", LOADED_BY_A_STRANGER, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    torch.testing.assert_close(found["adapter"], run.logits, **CLOSE)
    torch.testing.assert_close(merged, run.logits, **CLOSE)
    assert torch.equal(found["merged"], merged)
    assert not online.leaks()


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(run, tmp_path):
    """The same weights in several files, without the parts that a base may lack; then one value moved."""
    model = AutoModelForPreTraining.from_pretrained(run.base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert not other_base(run.folder / "adapter", tmp_path / "sharded")
    with torch.no_grad():
        model.vision_model.norm.bias[0] += 1
    model.save_pretrained(tmp_path / "moved")
    assert other_base(run.folder / "adapter", tmp_path / "moved")
    assert fingerprint(tmp_path / "nothing") is None


def test_merging_into_another_base_is_said(run, tmp_path, capsys):
    model = AutoModelForPreTraining.from_pretrained(run.base)
    with torch.no_grad():
        model.vision_model.norm.bias[0] += 1
    model.save_pretrained(tmp_path / "moved")
    tiny.processor().save_pretrained(tmp_path / "moved")
    adapter = str(run.folder / "adapter")
    assert main(["merge", adapter, str(tmp_path / "one")]) == 0
    assert "trained on" not in capsys.readouterr().err
    assert main(["merge", adapter, str(tmp_path / "two"), "--base", str(tmp_path / "moved")]) == 0
    assert "does not hold the weights that" in capsys.readouterr().err


def test_a_base_with_other_weights_stops_the_push(online, run, tmp_path):
    other = shutil.copytree(run.base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "vision_model.blocks.0.mlp.fc2.bias"
    save_file(
        weights | {name: weights[name] + torch.linspace(-1, 1, 32)},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    upload(other, "alice/other", api(online))
    said = []
    with pytest.raises(ExportDiffers, match=r"does not give .* logits: by up to .* is that the same model"):
        publish_adapter(run.folder, "alice/adapter", base="alice/other", api=api(online), say=said.append)
    assert "alice/other does not hold the weights that the adapter was trained on" in said
    assert online.repository("models", "alice/adapter") is None


def test_code_of_the_base_is_never_run(online, run, tmp_path):
    """Nor fetched: the base's repository may be anybody's."""
    trap, sprung = shutil.copytree(run.base, tmp_path / "trap"), tmp_path / "sprung"
    for file in trap.glob("*_unit.py"):
        file.write_text(f"open({str(sprung)!r}, 'w')\n" + file.read_text())
    upload(trap, "alice/trap", api(online))
    publish_adapter(run.folder, "alice/adapter", base="alice/trap", api=api(online))
    assert not sprung.exists()
    assert "adapter_model.safetensors" in online.files("alice/adapter")


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(adapters, "check_adapter", lambda *rest: None)


def test_what_the_adapters_repository_says(online, unchecked, run):
    client = api(online)
    upload(run.base, "alice/base", client)
    done = publish_adapter(run.folder, "alice/adapter", base="alice/base", api=client, private=True)
    files = online.files("alice/adapter")
    card = ModelCard(files["README.md"].decode()).data
    assert (card.base_model, card.base_model_relation, card.license) == ("alice/base", "adapter", "cc-by-4.0")
    recipe = json.loads(files["recipe.json"])
    assert recipe["training"] == {"seed": 1}
    assert recipe["start"] == str(Path("~", "base"))
    assert not [name for name, content in files.items() if str(run.base).encode() in content]
    assert client.model_info("alice/adapter").private
    proposed = publish_adapter(
        run.folder / "adapter", "alice/adapter", base="alice/base", api=client, create_pr=True, license="mit"
    )
    assert online.head("alice/adapter") == done.commit
    assert b"license: mit" in online.files("alice/adapter", "refs/pr/1")["README.md"]
    assert proposed.url.endswith("/discussions/1")
    edited = files["README.md"] + b"\nMy words.\n"
    client.upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id="alice/adapter")
    kept = publish_adapter(run.folder, "alice/adapter", base="alice/base", api=client, license="mit")
    assert (kept.kept, kept.uploaded) == (["README.md"], [])
    assert online.files("alice/adapter")["README.md"] == edited
    branch = publish_adapter(
        run.folder, "alice/adapter", base="alice/base", api=client, revision="lora", license="mit", overwrite_card=True
    )
    assert branch.kept == []
    assert online.head("alice/adapter", "lora") == branch.commit != done.commit


def test_a_dry_run_needs_no_network_for_a_base_in_the_cache(online, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    upload(run.base, "alice/cached", api(online))
    api(online).snapshot_download("alice/cached")
    online.stop()
    assert main(["push", "--adapter", str(run.folder), "alice/adapter", "--base", "alice/cached", "--dry-run"]) == 0
    assert "checked; nothing was uploaded" in capsys.readouterr().out
    assert main(["push", "--adapter", str(run.folder), "alice/adapter", "--base", "alice/nowhere", "--dry-run"]) == 2
    assert "not in the cache" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "publish that one first"),
        (["--base", "alice/adapter"], "is the base"),
        (["--base", "nobody"], "name the owner too"),
        (["--base", "alice/gone"], "no such model on the Hub"),
        (["--base", "alice/gone", "--encoder-only"], "does not go with --adapter"),
    ],
)
def test_refusals_are_one_line(online, run, capsys, monkeypatch, options, said):
    monkeypatch.setattr(adapters, "_api", lambda: api(online))
    assert main(["push", "--adapter", str(run.folder), "alice/adapter", *options]) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("exporting")]
    assert len(lines) == 1
    assert said in lines[0]
    assert online.repository("models", "alice/adapter") is None


def test_what_is_no_adapter_is_refused(run, tmp_path, capsys):
    for folder in (run.base, tmp_path / "missing"):
        assert main(["push", "--adapter", str(folder), "alice/adapter", "--base", "alice/base", "--dry-run"]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert "no adapter there" in error or "no such folder" in error
    assert main(["push", str(run.folder), "alice/adapter", "--base", "alice/base"]) == 2
    assert "--base goes with --adapter" in capsys.readouterr().err
