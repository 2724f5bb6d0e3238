"""Exported encoders: what ONNX Runtime and torch.export compute, what the folder holds, what stops an export."""

import importlib.util
import json
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from test_encoder import encoder, pixels
from test_features import clip
from tiny import image_processor
from transformers import AutoImageProcessor, AutoModel, DINOv3ViTConfig, RadioConfig, Siglip2VisionConfig

from training import onnx_export
from training.onnx_export import (
    CannotExport,
    ExportMismatch,
    TraceableEncoder,
    check_shapes,
    compare,
    export_encoder,
    export_onnx,
    export_program,
    readme,
    session,
)
from unit_cli.__main__ import main
from unit_cli.export import _image_processor

installed = all(importlib.util.find_spec(name) for name in onnx_export.NEEDS)
needs_onnx = pytest.mark.skipif(not installed, reason="needs the extra 'export'")

# None of them the traced size. Table of 8 x 8 patches of 8 pixels: one patch, the table, a batch, wide, high, beyond.
SHAPES = [(1, 8, 8), (1, 64, 64), (3, 24, 40), (1, 8, 56), (2, 48, 16), (1, 80, 24), (2, 16, 96), (1, 88, 88)]


def closeness(given, expected) -> None:
    np.testing.assert_allclose(given, expected, atol=2e-5, rtol=0)


# -- positions by one formula ----------------------------------------------------------------------


@pytest.mark.parametrize("nominal", [40, 24], ids=["covers", "smaller"])
@torch.no_grad()
def test_positions_for_tracing_are_the_positions(nominal):
    embeddings = encoder(cpe_max_size=40, image_size=nominal).embeddings  # a table of 5 x 5
    for rows in range(1, 12):
        for cols in range(1, 12):
            expected = embeddings.positions(rows, cols)
            torch.testing.assert_close(embeddings.gathered_positions(rows, cols), expected, atol=1e-6, rtol=0)


# -- one export, looked at from all sides ----------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By the command line: every oddity of the released format in one encoder. Folder, the encoder, what was said."""
    if not installed:
        pytest.skip("needs the extra 'export'")
    root = tmp_path_factory.mktemp("export")
    model = encoder(
        num_cls_tokens=3,
        register_multiple=4,
        image_size=32,  # not what the table covers: positions are stretched to the longer side
        normalize_pixels=True,
        pooling="mean",
        num_hidden_layers=1,
    )
    model.save_pretrained(root / "model")
    image_processor(do_normalize=False).save_pretrained(root / "model")
    with mock.patch("builtins.print") as said:
        assert main(["export", str(root / "model"), str(root / "out")]) == 0
    return root / "out", model, "\n".join(str(call.args[0]) for call in said.call_args_list)


def test_the_folder_holds_what_it_says(exported):
    folder, _, said = exported
    names = ["README.md", "config.json", "model.onnx", "model.pt2", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert f"{folder}: {', '.join(names)}; largest difference from torch" in said
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "out"]  # nothing left beside
    assert "auto_map" not in json.loads((folder / "config.json").read_text())  # no code goes along
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == image_processor(do_normalize=False).to_dict()


@pytest.mark.parametrize(("batch", "height", "width"), SHAPES)
@torch.no_grad()
def test_onnx_runtime_computes_what_torch_computes(exported, batch, height, width):
    folder, model, _ = exported
    given = pixels(batch, 3, height, width, seed=7).sigmoid()
    expected = model(given)
    tokens, pooled = session(folder / "model.onnx").run(
        ["last_hidden_state", "pooler_output"], {"pixel_values": given.numpy()}
    )
    closeness(tokens, expected.last_hidden_state)
    closeness(pooled, expected.pooler_output)


@torch.no_grad()
def test_the_program_computes_what_torch_computes(exported):
    folder, model, _ = exported
    program = torch.export.load(folder / "model.pt2").module()
    for batch, height, width in SHAPES:
        given = pixels(batch, 3, height, width, seed=7).sigmoid()
        if min(height, width) < 16:  # two patches a side at least
            with pytest.raises(RuntimeError, match="to be >= 16, but got 8"):
                program(given)
            continue
        expected = model(given)
        tokens, pooled = program(given)
        closeness(tokens, expected.last_hidden_state)
        closeness(pooled, expected.pooler_output)


def test_the_program_holds_no_pickle(exported):
    folder, _, _ = exported
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        for name in archive.namelist():
            assert not archive.read(name).startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")), name


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(exported):
    folder, _, _ = exported
    runtime, program = session(folder / "model.onnx"), torch.export.load(folder / "model.pt2").module()
    for height, width in ((20, 24), (24, 31)):
        given = torch.zeros(1, 3, height, width)
        with pytest.raises(Exception, match="reshape"):
            runtime.run(None, {"pixel_values": given.numpy()})
        with pytest.raises(RuntimeError, match=r"to be of the form 8\*"):
            program(given)


@torch.no_grad()
def test_the_readmes_code_runs_on_numpy_and_onnx_runtime_alone(exported, monkeypatch):
    folder, model, _ = exported
    readme = (folder / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    imports = [line for line in code.splitlines() if "import" in line]
    assert imports == ["import numpy as np", "import onnxruntime"]
    image = np.random.default_rng(0).integers(0, 256, size=(35, 50, 3), dtype=np.uint8)
    names = {"image": image}
    monkeypatch.chdir(folder)
    exec(code, names)
    given = torch.tensor(image[:32, :48]).permute(2, 0, 1)[None] / 255  # normalised inside
    tokens = model(given).last_hidden_state[0, 1:]
    closeness(names["spatial"], tokens.unflatten(0, (4, 6)))


def test_an_existing_folder_is_left_alone(exported, capsys):
    folder, _, _ = exported
    before = (folder / "README.md").read_text()
    assert main(["export", str(folder.parent / "model"), str(folder)]) == 2
    assert f"{folder} is there already; name a folder that is not" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before


@torch.no_grad()
def test_an_encoder_that_changed_does_not_pass_the_comparison(exported):
    folder, model, _ = exported
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    files = folder / "model.onnx", folder / "model.pt2"
    other.norm.bias[0] += 0.01
    with pytest.raises(ExportMismatch, match=r"ONNX Runtime at batch 1, 16 x 24 pixels: last_hidden_state differs"):
        compare(other, *files, shapes=[(1, 3, 16, 24)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.float32([1.0, 2.0]), None),
        (np.float32([1.0, 2.0001]), None),  # 1e-4 of the largest value is 2e-4
        (np.float32([1.0, 2.0003]), "tokens differs from torch by 0.0003, allowed are 0.0002"),
        (np.float32([1.0, np.nan]), "differs"),
        (np.float32([1.0]), r"has the shape \(1,\), torch gives \(2,\)"),
        (RuntimeError("no such operator"), r"does not run \(no such operator\)"),
    ],
    ids=str,
)
def test_what_counts_as_a_difference(given, words):
    run = mock.Mock(side_effect=[given] if isinstance(given, Exception) else [[given]])
    arguments = ("a runtime", run, ["tokens"], [np.float32([1.0, 2.0])], (2, 3, 16, 24))
    if words is None:
        assert onnx_export._compare_one(*arguments) < 2e-4
        return
    with pytest.raises(ExportMismatch, match="a runtime at batch 2, 16 x 24 pixels: .*" + words):
        onnx_export._compare_one(*arguments)


# -- what stops it ---------------------------------------------------------------------------------


def test_a_mismatch_leaves_nothing_on_disk(tmp_path):
    def empty(encoder, path):
        path.write_bytes(b"")

    with (
        mock.patch.multiple(onnx_export, export_onnx=empty, export_program=empty, check_packages=lambda: None),
        mock.patch.object(onnx_export, "compare", side_effect=ExportMismatch("tokens differ by 1")),
        pytest.raises(ExportMismatch, match="differ by 1"),
    ):
        export_encoder(encoder(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_what_installs_them(tmp_path, capsys):
    def find(name):
        return None if name in ("onnx", "onnxscript") else importlib.util.find_spec("torch")

    with mock.patch.object(onnx_export, "find_spec", find):
        assert main(["export", "model", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "unit export: exporting needs onnx, onnxscript: pip install 'unit-vision[export]' (or pip install onnx "
        "onnxscript)\n"
    )


def test_an_encoder_that_takes_more_than_pixels_is_refused():
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = AutoModel.from_config(Siglip2VisionConfig(**settings, patch_size=8))
    with pytest.raises(CannotExport, match=r"siglip2_vision_model is a function of .*spatial_shapes"):
        TraceableEncoder(model)


def test_the_sizes_of_the_check_reach_beyond_the_table_and_stay_small():
    shapes = check_shapes(encoder().config)  # 8 x 8 patches of 8
    grids = {(height // 8, width // 8) for _, _, height, width in shapes}
    assert {(1, 1), (8, 8)} <= grids
    assert any(rows > 8 for rows, _ in grids)
    assert any(cols > 8 for _, cols in grids)
    assert (3, 5) not in grids  # the one that is traced
    assert max(batch for batch, *_ in shapes) > 1


# -- vision transformers of transformers -----------------------------------------------------------

FOREIGN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
FOREIGN |= {"patch_size": 8, "image_size": 32}


@needs_onnx
@torch.no_grad()
def test_a_clip_encoder_runs_on_onnx_runtime_at_any_size(tmp_path):
    model = clip()
    export_onnx(model, tmp_path / "model.onnx")
    runtime = session(tmp_path / "model.onnx")
    assert model.config._attn_implementation == "sdpa"  # as it was
    for batch, height, width in ((1, 32, 32), (2, 16, 56), (1, 48, 24), (1, 8, 8)):
        given = pixels(batch, 3, height, width)
        expected = model(given, interpolate_pos_encoding=True)
        tokens, pooled = runtime.run(None, {"pixel_values": given.numpy()})
        closeness(tokens, expected.last_hidden_state)
        closeness(pooled, expected.pooler_output)


@pytest.mark.parametrize("config", [RadioConfig, DINOv3ViTConfig], ids=["radio", "dinov3"])
@torch.no_grad()
def test_other_encoders_of_transformers_are_traced_for_any_size(tmp_path, config):
    model = AutoModel.from_config(config(**FOREIGN)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    export_program(model, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, height, width in ((1, 32, 32), (2, 16, 56), (1, 48, 24)):
        given = pixels(batch, 3, height, width)
        closeness(program(given)[0], model(given).last_hidden_state)


def test_an_image_processor_that_cannot_be_made_is_described(tmp_path):
    """DINOv3's own needs torchvision."""
    config = DINOv3ViTConfig(**FOREIGN)
    config.save_pretrained(tmp_path)
    saved = {"image_processor_type": "NoSuchImageProcessor", "image_mean": [0.1, 0.2, 0.3], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    processor = _image_processor(str(tmp_path), config)
    assert json.loads(processor.to_json_string())["image_processor_type"] == "ViTImageProcessor"
    assert "mean = np.array([0.1, 0.2, 0.3]" in readme(config, processor, "dinov3", [])
