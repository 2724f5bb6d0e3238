"""Averages of weights: by hand, across checkpoints, at the end of a run, and of folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import STAGE_1, IntraScaleTrainer, arguments, data, mixture, model_and_teacher, train  # noqa: F401
from tiny import unit_model, vision_config
from torch import nn

from modeling_unit import UnitForPreTraining, UnitVisionModel
from training.arguments import LoraArguments
from training.averaging import WeightAverage, average_models
from training.lora import add_lora
from unit_cli.__main__ import main as unit


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the moving average ----------------------------------------------------------------------------


def test_the_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, decay=0.15)
    for value in (10.0, 20.0, 40.0):
        model.weight.data.fill_(value)
        average.update()
    # decays: (1 + 0) / (10 + 0) = 0.1, then 2 / 11 and 3 / 12, which are more than 0.15
    expected = 0.1 * 0.0 + 0.9 * 10.0
    expected = 0.15 * expected + 0.85 * 20.0
    expected = 0.15 * expected + 0.85 * 40.0
    assert float(average.shadow["weight"]) == pytest.approx(expected)


def test_the_average_is_float32_and_goes_in_and_out_bitwise():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.9)
    assert {name: each.dtype for name, each in average.shadow.items()} == {"weight": torch.float32}
    average.shadow["weight"] += 1.0
    before = tensors(model)
    raw = average.put_in()
    assert torch.allclose(model.weight.float(), before["weight"].float() + 1.0, atol=0.02)
    average.take_out(raw)
    assert equal(tensors(model), before)


def test_the_run_is_the_same_and_ends_at_the_average(data, tmp_path):  # noqa: F811
    plain, start = train(IntraScaleTrainer, tmp_path / "plain", data, max_steps=4)
    with_average, _ = train(IntraScaleTrainer, tmp_path / "average", data, max_steps=4, ema_decay=0.5)
    last = dict(plain.model.named_parameters())
    raw = load_file(tmp_path / "average" / "raw" / "weights.safetensors")
    assert all(torch.equal(raw[name], each) for name, each in last.items())  # averaging disturbs nothing
    averaged = dict(with_average.model.named_parameters())
    for name, each in averaged.items():
        assert torch.equal(each, with_average.average.shadow[name])
    # it lies between where the run began and where it ended
    name = "vision_model.blocks.0.attn.qkv.weight"
    way, gone = last[name] - start[name], averaged[name] - start[name]
    assert 0.2 < float(((way * gone).sum() / way.square().sum()).detach()) < 1.0


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_has_the_same_average_bitwise(data, tmp_path, lora):  # noqa: F811
    def run(out, resume=None, steps=4):
        model, teacher = model_and_teacher()
        if lora:
            torch.manual_seed(1)
            model = add_lora(model, LoraArguments(parts=["encoder"], dropout=0.0))
        settings = arguments(out, max_steps=4, ema_decay=0.9, save_strategy="steps", save_steps=2)
        trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data, length=4), teacher=teacher)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "ema.safetensors").is_file()
    assert "ema.safetensors" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    resumed = run(tmp_path / "b", str(checkpoint))
    assert straight.average.updates == resumed.average.updates == 4
    assert equal(tensors(straight.model), tensors(resumed.model))
    raws = [load_file(tmp_path / each / "raw" / "weights.safetensors") for each in "ab"]
    assert equal(*raws)
    assert not equal(raws[0], {name: tensors(straight.model)[name] for name in raws[0]})
    if not lora:  # a checkpoint holds the weights as they train
        saved = load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors")
        assert all(torch.equal(saved[name], each) for name, each in raws[0].items() if name in saved)


def test_evaluation_sees_the_average_and_training_goes_on_without_it(data, tmp_path):  # noqa: F811
    model, teacher = model_and_teacher()
    settings = arguments(tmp_path, max_steps=2, ema_decay=0.5)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data, length=2), teacher=teacher)
    seen = []
    trainer.evaluation_loop = lambda *args, **kwargs: seen.append(tensors(trainer.model)) or 1 / 0
    trainer.train()
    trainer.average.take_out(load_file(tmp_path / "raw" / "weights.safetensors"))
    trainer._average_is_in = False
    raw = tensors(trainer.model)
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(mixture(data, length=2))
    assert equal(seen[0], trainer.average.shadow)
    assert equal(tensors(trainer.model), raw)


def test_a_checkpoint_without_an_average_is_said(data, tmp_path, capsys):  # noqa: F811
    train(IntraScaleTrainer, tmp_path / "a", data, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    train(IntraScaleTrainer, tmp_path / "b", data, max_steps=3, ema_decay=0.5, resume=checkpoint)
    assert "holds no average: it begins with the weights of step 2" in capsys.readouterr().out


def test_an_average_of_another_model_is_refused(tmp_path):
    average = WeightAverage(nn.Linear(2, 2), 0.5)
    average.save(tmp_path / "ema.safetensors")
    for other in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="averages another model"):
            WeightAverage(other, 0.5).load(tmp_path / "ema.safetensors")


def test_what_began_to_train_later_begins_in_the_average_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    average.shadow["bias"].fill_(7.0)
    average.updates = 5
    average.save(tmp_path / "ema.safetensors")
    model.weight.requires_grad_(True)
    later = WeightAverage(model, 0.5)
    assert later.load(tmp_path / "ema.safetensors") == 1
    assert later.updates == 5
    assert torch.equal(later.shadow["bias"], torch.full((2,), 7.0))
    assert torch.equal(later.shadow["weight"], model.weight.detach())


# -- with the teacher ------------------------------------------------------------------------------


def test_the_encoder_ends_between_itself_and_the_teacher(data, tmp_path):  # noqa: F811
    plain, start = train(IntraScaleTrainer, tmp_path / "plain", data)
    mixed, _ = train(IntraScaleTrainer, tmp_path / "mixed", data, teacher_interpolation=0.25)
    trained, found = tensors(plain.model), tensors(mixed.model)
    for name, each in found.items():
        if name.startswith("vision_model."):
            assert torch.allclose(each, 0.75 * trained[name] + 0.25 * start[name], atol=1e-6), name
        else:
            assert torch.equal(each, trained[name]), name


def test_interpolation_is_refused_before_the_run_where_it_makes_no_sense(data, tmp_path):  # noqa: F811
    settings = arguments(tmp_path, teacher_interpolation=0.5)
    model, _ = model_and_teacher()
    other = UnitVisionModel(vision_config(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"the teacher is no start of this encoder: it has blocks\.1"):
        IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data), teacher=other)
    with pytest.raises(ValueError, match="needs a teacher"):
        IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data))
    for part in ("encoder", "language_decoder"):  # of the base below others the merged model is made
        model, teacher = model_and_teacher()
        adapted = add_lora(model, LoraArguments(parts=[part]))
        with pytest.raises(ValueError, match="a model without adapters"):
            IntraScaleTrainer(model=adapted, args=settings, train_dataset=mixture(data), teacher=teacher)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"teacher_interpolation": -0.1}, r"teacher_interpolation must lie in \[0, 1\)"),
        ({"teacher_dtype": "float16"}, "teacher_dtype must be"),
        ({"teacher_cache_gigabytes": 0}, "teacher_cache_gigabytes must be positive"),
        (
            {"ema_decay": 0.9, "load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
            | {"save_steps": 1, "eval_steps": 1},
            "load_best_model_at_end takes",
        ),
    ],
)
def test_wrong_settings_are_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **changes)


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two whole models and the encoder of a third, with weights that differ."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "three")):
        torch.manual_seed(seed)
        model = unit_model()
        model.save_pretrained(root / name)
        if name == "three":
            model.vision_model.save_pretrained(root / "encoder")
    return root


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_average_of_folders_by_hand(folders, tmp_path, capsys):
    models = [str(folders / name) for name in ("one", "two", "three")]
    assert unit(["average", *models, "--weights", "2", "1", "1", "--out", str(tmp_path / "out")]) == 0
    assert "(0.5 " in capsys.readouterr().out
    one, two, three = (weights_of(folders / name) for name in ("one", "two", "three"))
    found = UnitForPreTraining.from_pretrained(tmp_path / "out").state_dict()
    for name, each in one.items():
        assert torch.allclose(found[name], 0.5 * each + 0.25 * two[name] + 0.25 * three[name], atol=1e-6), name


def test_an_average_with_an_encoder_leaves_the_other_parts(folders, tmp_path):
    done = average_models([folders / "one", folders / "encoder"], tmp_path / "out", [3, 1])
    one, encoder, found = (weights_of(each) for each in (folders / "one", folders / "encoder", tmp_path / "out"))
    assert done["tensors"] == len(encoder)
    for name, each in one.items():
        inside = name.removeprefix("vision_model.")
        expected = each if inside == name else 0.75 * each + 0.25 * encoder[inside]
        assert torch.allclose(found[name], expected, atol=1e-6), name
    average_models([folders / "encoder", folders / "one"], tmp_path / "encoder")
    mixed = UnitVisionModel.from_pretrained(tmp_path / "encoder").state_dict()
    for name, each in encoder.items():
        assert torch.allclose(mixed[name], 0.5 * each + 0.5 * one[f"vision_model.{name}"], atol=1e-6), name


def test_checkpoints_are_averaged_as_they_lie(data, tmp_path):  # noqa: F811
    train(IntraScaleTrainer, tmp_path / "run", data, max_steps=2, save_strategy="steps", save_steps=1)
    average_models([tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2)], tmp_path / "out")
    assert {"config.json", "model.safetensors"} <= {each.name for each in (tmp_path / "out").iterdir()}
    assert not {"manifest.json", "trainer_state.json"} & {each.name for each in (tmp_path / "out").iterdir()}
    UnitForPreTraining.from_pretrained(tmp_path / "out")


def test_what_has_no_average_is_refused_in_one_line(folders, tmp_path, capsys):
    torch.manual_seed(0)
    unit_model(vision=vision_config(intermediate_size=40)).save_pretrained(tmp_path / "narrow")
    unit_model(vision=vision_config(num_attention_heads=4)).save_pretrained(tmp_path / "heads")
    shutil.copytree(folders / "one", tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").rename(tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    capsys.readouterr()  # the bars of saving
    cases = {
        "narrow": "mlp.fc1.bias is (40,), not (48,)",
        "heads": "its vision_config.num_attention_heads is 4, not 2",
        "pickle": "no model.safetensors there",
        "adapter": "merge them first",
        "nowhere": "no such folder",
    }
    for name, words in cases.items():
        out = str(tmp_path / "out")
        assert unit(["average", str(folders / "one"), str(tmp_path / name), "--out", out]) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1, line
        assert not (tmp_path / "out").exists()
    for given, words in (([1.0], "1 weights for 2 models"), ([1.0, -1.0], "not be negative"), ([0, 0], "be zero")):
        with pytest.raises(ValueError, match=words):
            average_models([folders / "one", folders / "two"], tmp_path / "out", given)
    with pytest.raises(ValueError, match="two models or more"):
        average_models([folders / "one"], tmp_path / "out")
