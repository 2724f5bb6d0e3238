"""`unit plan`: counts against closed forms and against real steps of tiny models."""

import json

import pytest
import torch
import yaml
from PIL import Image
from tiny import OPT, document_row, image_processor, picture_row, unit_config, unit_model, vision_config
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from benchmarks.common import decoder_flops, encoder_flops
from modeling_unit import UnitVisionModel
from training import plan as plans
from training.data.schema import write_shards
from training.plan import (
    DEVICES,
    Assumed,
    Described,
    Speed,
    assumed_batch,
    describe,
    device_memory,
    empty_models,
    make_plan,
    parse_hardware,
    static_memory,
)
from training.plan_step import GroupShape, Step, _inputs, rehearse, scratch_arguments
from training.recipe import Recipe, read_recipe
from training.trainer import UnitTrainer
from unit_cli.__main__ import main as cli

BATCH = [GroupShape("natural_x1", 3, (4, 4), 64), GroupShape("document_x4", 2, (8, 8), 64)]


def models(config=None, **training):
    recipe = Recipe(stage="intra_scale", training=training)
    arguments = scratch_arguments({"max_steps": 1} | training)
    config = config or unit_config()
    described = Described(config, image_processor(), config.vision_config)
    return *empty_models(described, recipe, arguments), arguments


def stepped(batch=BATCH, config=None, **training) -> Step:
    gradients_kept = training.pop("gradients_kept", False)
    model, teacher, arguments = models(config, **training)
    return rehearse(model, teacher, arguments, image_processor(), batch, gradients_kept=gradients_kept)


def real_inputs(model, arguments):
    inputs = {group.name: _inputs(model, group, arguments) for group in BATCH}
    for group in inputs.values():
        visual = group["input_ids"].shape[1] - 64
        group["pixel_values"] = torch.zeros_like(group["pixel_values"])
        group["input_ids"][:, :visual] = model.config.image_token_id
        group["attention_mask"][:, :-3] = 1
    return inputs


# -- the step -----------------------------------------------------------------------------------------------------


def test_flops_are_those_of_a_real_step(tmp_path):
    arguments = scratch_arguments({"max_steps": 1, "output_dir": str(tmp_path)})
    model = unit_model()
    trainer = UnitTrainer(
        model=model, args=arguments, teacher=model.make_teacher(), image_processor=image_processor(), train_dataset=[0]
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.text_behind = True  # as with the collator's batches: the text and the token before get logits
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(model, real_inputs(model, arguments))
    step = stepped()
    # torch's counter leaves out the attention of a CPU
    attention = sum(flops for key, (_, flops, _) in step.operators.items() if "attention" in key[0])
    assert attention > 0
    assert step.flops - attention == counter.get_total_flops()


def test_flops_are_those_of_the_formulas():
    """Each product three times, but the patch embedding's twice, for pixels need no gradient, and attention's 3.5
    times: its backward pass does five products in place of two."""
    config = unit_config()
    rows, layers, width = 4, 2, 32
    step = stepped([GroupShape("document_x4", rows, (8, 8), 64)], vision_weight=0.0)
    embedding = 2 * 64 * 3 * 8 * 8 * width
    connector = 2 * 64 * 2 * width * width
    attention = [layers * 4 * tokens**2 * width for tokens in (64 + 1, 64 + 64)]  # in full
    causal = layers * 2 * 128 * 129 * width  # as `decoder_flops` counts it
    products = encoder_flops(config.vision_config, 8, 8) - embedding - attention[0]
    # logits from the last visual token on
    products += decoder_flops(config.text_config, 128, labelled=1 + 64) - causal + connector
    assert step.flops == rows * (3 * products + 2 * embedding + 3.5 * sum(attention))


def test_what_is_saved_for_backward_is_what_a_real_step_saves(tmp_path):
    """Bytes of the storages that autograd packs, weights left out, against the bytes alive when backward begins."""
    arguments = scratch_arguments({"max_steps": 1, "output_dir": str(tmp_path)})
    model = unit_model()
    trainer = UnitTrainer(
        model=model, args=arguments, teacher=model.make_teacher(), image_processor=image_processor(), train_dataset=[0]
    )
    trainer.text_behind = True
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    inputs = real_inputs(model, arguments)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(model, inputs)
    assert loss.requires_grad
    kept = stepped().kept
    # besides what is saved: results of the step that are still held
    assert sum(saved.values()) <= kept <= 1.1 * sum(saved.values())


def test_groups_add_up_and_rows_scale():
    one, other = (stepped([group]) for group in BATCH)
    both = stepped()
    assert both.flops == one.flops + other.flops
    assert both.kept == pytest.approx(one.kept + other.kept, rel=0.05)
    twice = stepped([GroupShape("document_x4", 4, (8, 8), 64)])
    assert twice.flops == 2 * other.flops
    assert twice.kept > 1.8 * other.kept


def test_logits_of_a_large_vocabulary_dominate():
    config = unit_config(text=OPT | {"vocab_size": 8192})
    step = stepped([GroupShape("document_x4", 2, (8, 8), 64)], config)
    # logits, their log-softmax and gradients: at least two copies in float32 of (2, 64, 8192), of the text alone
    assert step.logits >= 2 * 2 * 63 * 8192 * 4
    assert step.logits > 0.5 * step.peak


def test_checkpointing_saves_memory_and_costs_a_forward_pass():
    config = unit_config(vision=vision_config(num_hidden_layers=8), text=OPT)
    group = [GroupShape("document_x4", 4, (8, 8), 64)]
    plain, checkpointed = stepped(group, config), stepped(group, config, gradient_checkpointing=True)
    assert checkpointed.kept < 0.5 * plain.kept
    assert 1.15 * plain.flops < checkpointed.flops < 1.34 * plain.flops


def test_bfloat16_takes_less_and_copies_weights():
    single, half = stepped(), stepped(bf16=True)
    assert single.casts == 0 < half.casts
    assert half.kept < single.kept
    # the encoder's short attention keeps its square, which the kernel makes anew: a forward product less
    square = sum(group.rows * (group.grid[0] * group.grid[1] + 1) ** 2 for group in BATCH)
    assert half.flops == single.flops - 2 * square * 32 * 2


def test_gradients_of_a_micro_batch_before_are_counted():
    model, _, _ = models()
    size = 4 * sum(each.numel() for each in model.parameters())
    assert stepped(gradients_kept=True).peak >= size
    assert stepped(gradients_kept=True).gradients == size


# -- memory -------------------------------------------------------------------------------------------------------


def test_optimiser_and_weights_in_closed_form():
    model, teacher, arguments = models()
    count = sum(each.numel() for each in model.parameters())
    inner = sum(each.numel() for each in teacher.parameters())
    assert static_memory(model, teacher, arguments) == {
        "weights": 4 * count,
        "teacher": 4 * inner,
        "optimiser": 8 * count,
        "gradients": 4 * count,
        "optimiser_step": 4 * count,
    }


def test_frozen_parts_have_no_optimiser_and_muon_halves_its_matrices():
    model, teacher, arguments = models(freeze=["language_decoder"])
    trained = sum(each.numel() for name, each in model.named_parameters() if "language_model" not in name)
    assert static_memory(model, teacher, arguments)["optimiser"] == 8 * trained
    model, teacher, arguments = models(optimizer="muon")
    count = sum(each.numel() for each in model.parameters())
    memory = static_memory(model, teacher, arguments)["optimiser"]
    # the vision decoder's two matrices and the layers' are Muon's; the decoder's embeddings are not
    assert 4 * count < memory < 8 * count


def test_fsdp_divides_what_ddp_repeats():
    model, teacher, arguments = models()
    step = Step(peak=10_000_000, gradients=1000, casts=2000, logits=500)
    alone = device_memory(model, teacher, arguments, step)
    ddp = device_memory(model, teacher, arguments, step, devices=4)
    fsdp = device_memory(model, teacher, arguments, step, devices=4, strategy="fsdp")
    assert sum(alone.values()) == alone["weights"] + alone["teacher"] + alone["optimiser"] + 10_000_000
    assert sum(ddp.values()) - sum(alone.values()) == alone["weights"]  # the buckets, all being trained
    assert (4 * fsdp["weights"], 4 * fsdp["optimiser"]) == (alone["weights"], alone["optimiser"])
    assert fsdp["teacher"] == alone["teacher"]


# -- hardware and time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("8xH100-80GB", "H100-80GB", 8), ("h100", "H100-80GB", 1), ("2 x rtx4090", "RTX4090-24GB", 2)],
)
def test_hardware_is_read(text, name, count):
    assert parse_hardware(text) == (DEVICES[name], count)


@pytest.mark.parametrize("text", ["8xH1000", "0xH100", "A100", "", "4xcpu"])
def test_unknown_hardware_is_refused_with_what_there_is(text):
    with pytest.raises(ValueError, match="H100-80GB"):
        parse_hardware(text)


def test_an_operator_takes_the_longest_of_its_three_limits():
    speed = Speed({"bfloat16": 100.0, "float32": 10.0}, bandwidth=50.0, call=1.0)
    assert speed.seconds(Step({("mm", "bfloat16", ()): [1, 1000, 100]})) == 10.0
    assert speed.seconds(Step({("mm", "float32", ()): [1, 1000, 100]})) == 100.0
    assert speed.seconds(Step({("add", "float32", ()): [1, 0, 100]})) == 2.0
    assert speed.seconds(Step({("add", "float32", ()): [7, 0, 100]})) == 7.0
    # a kind of its own rate, which products do not have
    speed = Speed({"bfloat16": 100.0, "float32": 10.0}, 50.0, 1.0, kinds={("gelu", "float32"): 20.0})
    assert speed.seconds(Step({("gelu", "float32", ()): [1, 0, 100]})) == 5.0
    assert speed.seconds(Step({("gelu", "bfloat16", ()): [1, 0, 100]})) == 2.0


def test_this_machines_operators_are_measured_kind_by_kind(monkeypatch):
    monkeypatch.setattr(plans, "_median_time", lambda work, seconds: work() is None or 0.5)
    monkeypatch.setattr(plans, "PROBE", (4, 8))
    step = Step(
        {
            ("gelu", "float32", ()): [1, 0, 9],
            ("add", "bfloat16", ()): [1, 0, 9],
            ("_to_copy", "float32", ()): [1, 0, 9],
        }
    )
    step.operators |= {("mm", "float32", ((2, 2), (2, 2))): [1, 16, 48], ("embedding", "float32", ()): [1, 0, 9]}
    kinds = plans.kinds_measured(step, 0.1)
    # 32 numbers: read and written as float32; two read, one written as bfloat16; read wide, written narrow
    assert kinds == {("gelu", "float32"): 512.0, ("add", "bfloat16"): 384.0, ("_to_copy", "float32"): 384.0}


# -- recipes ------------------------------------------------------------------------------------------------------

RECIPES = plans.Path(plans.__file__).parent / "recipes"


@pytest.mark.parametrize(
    ("folder", "encoder", "grid"),
    [
        # OpenCLIP's ViT-H/14 vision tower without its projection: 630.77 M; CLIP's ViT-L/14: 303.18 M
        ("vit-h", 630_766_080, (64, 64)),
        ("clip-l", 303_179_776, (64, 64)),
        ("siglip2-so400m", None, (64, 64)),
        ("dinov3-l", None, (56, 56)),
    ],
)
def test_both_stages_of_a_shipped_recipe_are_described_offline(folder, encoder, grid):
    described = []
    for path in sorted((RECIPES / folder).glob("*.yaml")):
        recipe = read_recipe(path)
        found = describe(recipe, path)
        described.append(found.config.to_dict())
        assert found.teacher.hidden_size == found.config.vision_config.hidden_size
        batch = {group.name: group for group in assumed_batch(recipe, found, Assumed())}
        assert batch["document_x4"].grid == grid
        if recipe.stage == "inter_scale":
            assert set(batch) == {"document_x4", "document_x1", "natural_x1", "natural_x4"}
            assert batch["natural_x4"].teacher == batch["natural_x1"].grid
    assert described[0] == described[1]
    if encoder:
        _, teacher = empty_models(found, recipe, scratch_arguments({"max_steps": 1}))
        assert sum(each.numel() for each in teacher.parameters()) == encoder


@pytest.fixture
def tiny_recipe(tmp_path):
    UnitVisionModel(vision_config()).save_pretrained(tmp_path / "teacher")
    write_shards([document_row("some words", seed=seed) for seed in range(6)], tmp_path / "documents")
    write_shards([picture_row("a cat", seed=seed) for seed in range(6)], tmp_path / "pictures")
    settings = {
        "stage": "intra_scale",
        "teacher": str(tmp_path / "teacher"),
        "model": {"text_config": OPT, "connector_config": {"connector_type": "mlp", "unshuffle": 1}},
        "image_processor": {"patch_size": 8, "base_size": 32, "scale_as": "area", "max_side": 128},
        "groups": [
            {"kind": "document", "scale": 4, "rows": 3, "sources": [{"path": str(tmp_path / "documents")}]},
            {"kind": "natural", "scale": 1, "rows": 2, "sources": [{"path": str(tmp_path / "pictures")}]},
        ],
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 10, "gradient_accumulation_steps": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_rows_and_shapes_come_from_the_recipes_own_data(tiny_recipe):
    plan = make_plan(tiny_recipe, "4xH100")
    shapes = {group.name: (group.rows, group.grid, group.text) for group in plan.batch}
    # pages of 48 x 16 pixels and patches of 8 make 2 x 6, padded to 16 columns
    assert shapes == {"document_x4": (3, (2, 16), 32), "natural_x1": (2, (4, 4), 32)}
    assert plan.batch_from == "the recipe's data"
    assert plan.rows_per_step == 5 * 2 * 4
    assert plan.paper["steps"] == 15_000_000 // 40
    assert plan.fits
    assert not (tiny_recipe.parent / "out").exists()


def test_local_data_in_another_layout_is_read_too(tiny_recipe):
    folder = tiny_recipe.parent / "photos"
    folder.mkdir()
    lines = ["image,caption"]
    for number in range(4):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'a' * 100}")
    (folder / "captions.csv").write_text("\n".join(lines))
    source = f"{{dataset: {{path: '{folder}', layout: caption-pairs}}}}"
    groups = f"groups=[{{kind: natural, scale: 1, rows: 2, sources: [{source}]}}]"
    evaluated = ["training.eval_strategy=steps", "training.eval_steps=5", "training.metric_for_best_model=loss"]
    evaluated += ["training.early_stopping_patience=2", "training.save_strategy=best"]
    plan = make_plan(tiny_recipe, "H100", overrides=[groups, *evaluated])
    assert plan.batch_from == "the recipe's data"
    # 100 bytes, a prompt and an end, in whole steps of 32
    assert [(group.name, group.rows, group.text) for group in plan.batch] == [("natural_x1", 2, 128)]


def test_texts_are_counted_in_the_pieces_of_a_start_that_is_yet_to_be_written(tiny_recipe):
    """Stage 2 reads with the decoder that stage 1 is given: 200 bytes are 20 words, one step of 32."""
    folder = tiny_recipe.parent
    vocabulary = {piece: index for index, piece in enumerate(["</s>", "<unk>", "wordsword"])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder / "decoder")
    settings = {key: value for key, value in OPT.items() if key != "model_type"} | {"vocab_size": 512}
    OPTConfig(**settings).save_pretrained(folder / "decoder")
    write_shards([document_row("wordsword " * 20, seed=seed) for seed in range(6)], folder / "documents")
    stage1 = yaml.safe_load(tiny_recipe.read_text())
    del stage1["model"]["text_config"]
    stage1["language_decoder"] = str(folder / "decoder")
    tiny_recipe.write_text(yaml.safe_dump(stage1))
    groups = [*stage1["groups"], stage1["groups"][1] | {"scale": 4}, stage1["groups"][0] | {"scale": 1}]
    training = stage1["training"] | {"output_dir": str(folder / "out2")}
    stage2 = {"stage": "inter_scale", "start": str(folder / "out"), "teacher": stage1["teacher"]}
    (folder / "stage2.yaml").write_text(yaml.safe_dump(stage2 | {"groups": groups, "training": training}))
    for path in (tiny_recipe, folder / "stage2.yaml"):
        plan = make_plan(path, "H100")
        assert plan.batch_from == "the recipe's data"
        assert {group.name: group.text for group in plan.batch}["document_x4"] == 32


def test_an_encoder_with_a_head_that_nothing_reads(tiny_recipe):
    """SigLIP's pooling head has no part in the loss: not trained, as in a run. Its teacher computes in bfloat16."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**settings, image_size=32, patch_size=8))
    siglip.save_pretrained(tiny_recipe.parent / "siglip")
    start = [f"{name}={tiny_recipe.parent / 'siglip'}" for name in ("start", "teacher")]
    plan = make_plan(tiny_recipe, "H100", overrides=[*start, "training.bf16=true"])
    [encoder] = [part for part in plan.parts if part.name == "encoder"]
    head = sum(each.numel() for name, each in siglip.named_parameters() if "head." in name)
    assert head
    assert encoder.trained == encoder.parameters - head
    assert plan.memory["teacher"] == 2 * encoder.parameters


def test_the_command_prints_json_and_says_when_it_does_not_fit(tiny_recipe, capsys, monkeypatch):
    assert cli(["plan", str(tiny_recipe), "--hardware", "H100", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["fits"]
    assert sum(out["memory"].values()) == out["needed"]
    small = plans.Device("H100-80GB", 1e12, 1e12, 1e12, 1.08, 1e9)  # 4.6 MB of room
    monkeypatch.setitem(plans.DEVICES, "H100-80GB", small)
    many = "groups=[{kind: document, scale: 4, rows: 400}]"
    assert cli(["plan", str(tiny_recipe), many, "--hardware", "H100"]) == 1
    assert "The batch does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "8xH1000"], "H100-80GB"),
        (["stage=teacher"], "knows the stages intra_scale and inter_scale"),
        (["groups=[]"], "there is nothing to plan"),
        (["teacher=null"], "needs `start` or `teacher`"),
    ],
)
def test_the_command_refuses_in_one_line(tiny_recipe, capsys, arguments, words):
    assert cli(["plan", str(tiny_recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# -- before step 1 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "outcome"), [(99, "refused"), (110, "warned"), (120, "silent")])
def test_a_batch_beyond_the_gpu_is_refused_before_anything_is_loaded(monkeypatch, capsys, free, outcome):
    monkeypatch.setattr(plans, "planned_apart", lambda *_: {"needed": 115 * plans.GIB})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * plans.GIB, 200 * plans.GIB))
    if outcome == "refused":
        with pytest.raises(ValueError, match=r"does not fit: the plan is 115\.0 GiB, there are 99\.0 GiB"):
            plans.check_fits("recipe.yaml", [], 1)
    else:
        plans.check_fits("recipe.yaml", [], 1)
        assert ("It will be close" in capsys.readouterr().out) == (outcome == "warned")


def test_the_plan_made_apart_is_the_plan(tiny_recipe):
    apart = plans.planned_apart(tiny_recipe, ["training.seed=2"], 1)
    assert apart["needed"] == make_plan(tiny_recipe, "H100", overrides=["training.seed=2"]).needed
    assert plans.planned_apart(tiny_recipe, ["stage=teacher"], 1) is None
