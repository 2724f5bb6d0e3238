"""The two stages on toy data: what moves, what is logged, what is refused, and that a run can be taken up again."""

import math

import pytest
import torch
from tiny import QWEN3, document_row, picture_row, processor, unit_model, vision_config

import training.terms
from modeling_unit import UnitForPreTraining, UnitForPreTrainingOutput, UnitVisionModel
from modeling_unit.modeling_unit import UnitImageFeatures
from training.arguments import LoraArguments, UnitTrainingArguments
from training.collator import NUM_CHARACTER_CLASSES, GroupCollator
from training.data.mixture import GroupArguments, GroupPlan, MixtureDataset, SourceArguments
from training.data.schema import write_shards
from training.lora import add_lora
from training.losses import Counted
from training.optim import PARTS, part_of
from training.terms import TermLog, means
from training.trainer import InterScaleTrainer, IntraScaleTrainer, UnitTrainer, freeze_parts, trainable_table

STAGE_1 = ("natural_x1", "document_x4")
STAGE_2 = (*STAGE_1, "natural_x4", "document_x1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    documents = [document_row(f"page {index}\nof it", 48, 16, seed=index) for index in range(12)]
    write_shards(documents, root / "documents")
    write_shards([picture_row(f"thing {index}", seed=index) for index in range(12)], root / "pictures")
    return root


def mixture(data, names=STAGE_1, length=6, slots=0) -> MixtureDataset:
    plans = []
    for name in names:
        kind, scale = name.split("_x")
        folder = data / ("documents" if kind == "document" else "pictures")
        arguments = GroupArguments(kind, int(scale), rows=2, sources=[SourceArguments(str(folder))])
        plans.append(GroupPlan(arguments, GroupCollator(processor(), kind, int(scale), slots), seed=0, window=2))
    return MixtureDataset(plans, length)


def model_and_teacher(**changes):
    """A small student that starts as its teacher, with the paper's random crops of the positions on."""
    torch.manual_seed(0)
    model = unit_model(vision=vision_config(num_hidden_layers=1), text=QWEN3 | {"num_hidden_layers": 2}, **changes)
    teacher = UnitVisionModel(vision_config(num_hidden_layers=1))
    teacher.load_state_dict(model.vision_model.state_dict())
    return model, teacher


def arguments(out, **changes) -> UnitTrainingArguments:
    settings = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 1, "remove_unused_columns": False, "label_names": ["labels"]}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "seed": 0}
    return UnitTrainingArguments(output_dir=str(out), **(settings | changes))


def train(trainer_class, out, data, names=STAGE_1, model_changes=None, freeze=(), resume=None, **changes):
    settings = arguments(out, **changes)
    slots = 2 if settings.character_weight else 0
    model, teacher = model_and_teacher(**(model_changes or {}))
    freeze_parts(model, list(freeze))
    if settings.alignment_weight:
        model.language_model.set_attn_implementation("eager")
    trainer = trainer_class(
        model=model,
        args=settings,
        train_dataset=mixture(data, names, settings.max_steps, slots),
        teacher=teacher if settings.vision_weight else None,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train(resume_from_checkpoint=resume)
    return trainer, before


def moved(model, before) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# -- what trains -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "names"), [(IntraScaleTrainer, STAGE_1), (InterScaleTrainer, STAGE_2)])
def test_every_tensor_moves_and_the_teacher_does_not(stage, names, data, tmp_path):
    trainer, before = train(stage, tmp_path, data, names)
    assert moved(trainer.model, before) == set(before)
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, before[f"vision_model.{name}"]), name
    assert not [parameter for parameter in trainer.teacher.parameters() if parameter.requires_grad]
    assert not trainer.teacher.training


@pytest.mark.parametrize("frozen", [["encoder"], ["language_decoder", "connector"], ["vision_decoder"]])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parts_stay_and_all_others_move(frozen, optimizer, data, tmp_path):
    trainer, before = train(IntraScaleTrainer, tmp_path, data, freeze=frozen, optimizer=optimizer, max_steps=2)
    expected = {name for name in before if part_of(name) not in frozen}
    assert moved(trainer.model, before) == expected


def test_without_a_vision_weight_the_vision_decoder_stays(data, tmp_path):
    trainer, before = train(IntraScaleTrainer, tmp_path, data, vision_weight=0.0)
    assert moved(trainer.model, before) == {name for name in before if part_of(name) != "vision_decoder"}


def test_without_a_language_weight_the_reader_stays(data, tmp_path):
    trainer, before = train(
        IntraScaleTrainer,
        tmp_path,
        data,
        model_changes={"num_character_classes": NUM_CHARACTER_CLASSES, "character_slots": 2},
        language_weight=0.0,
        character_weight=1.0,
    )
    reader = {"language_decoder", "connector"}
    assert moved(trainer.model, before) == {name for name in before if part_of(name) not in reader}
    assert not [key for entry in trainer.state.log_history for key in entry if key.endswith("language_loss")]


def test_the_table_counts_what_trains():
    model, _ = model_and_teacher()
    freeze_parts(model, ["encoder"])
    lines = {line.split()[0]: line.replace(",", "").split()[1:] for line in trainable_table(model).splitlines()}
    for part in ("encoder", "connector", "language_decoder", "vision_decoder"):
        parameters = [each for name, each in model.named_parameters() if part_of(name) == part]
        total = sum(each.numel() for each in parameters)
        trained, tensors = (0, 0) if part == "encoder" else (total, len(parameters))
        assert lines[part] == [str(total), str(trained), str(tensors)]
    assert lines["all"][0] == str(sum(parameter.numel() for parameter in model.parameters()))


def test_every_part_has_a_name_that_can_be_frozen():
    model = unit_model(projection_dim=3, num_character_classes=4)
    freeze_parts(model, list(PARTS))
    assert not [parameter for parameter in model.parameters() if parameter.requires_grad]


# -- the loss --------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_the_terms_it_logs(data, tmp_path):
    weights = {"vision_weight": 0.7, "vision_l1_weight": 0.3, "character_weight": 0.4, "alignment_weight": 0.2}
    weights |= {"language_weight": 0.9, "group_weights": {"natural_x1": 0.5}}
    trainer, _ = train(
        IntraScaleTrainer,
        tmp_path,
        data,
        model_changes={"num_character_classes": NUM_CHARACTER_CLASSES, "character_slots": 2},
        **weights,
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        vision = entry["natural_x1/vision_cosine"] + 0.3 * entry["natural_x1/vision_l1"]
        assert entry["natural_x1/vision_loss"] == pytest.approx(vision, abs=1e-4)
        expected = 0.9 * (0.5 * entry["natural_x1/language_loss"] + entry["document_x4/language_loss"]) + 0.7 * vision
        expected += 0.4 * entry["document_x4/character_loss"] + 0.2 * entry["document_x4/alignment_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-3)
        assert 0 <= entry["document_x4/character_accuracy"] <= 1
        assert 0 <= entry["document_x4/alignment_accuracy"] <= 1
        assert not [
            key for key in entry if key.startswith("document_x4/vision")
        ]  # the teacher sees natural pictures only


def test_losses_are_the_models_own(data, tmp_path):
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data))
    batch = trainer.train_dataset[0]
    loss, outputs = trainer.compute_loss(model.eval(), batch, return_outputs=True)
    total = 0.0
    for name in STAGE_1:
        inputs = {key: batch[name][key] for key in ("input_ids", "labels", "attention_mask", "pixel_values")}
        total += model(**inputs).loss
        assert outputs[name].vision_loss is None  # no teacher
    torch.testing.assert_close(loss, total)


def test_raw_pixels_need_the_image_processor(data, tmp_path):
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data))
    batch = trainer.train_dataset[0]
    name = STAGE_1[0]
    batch[name]["pixel_values"] = torch.zeros_like(batch[name]["pixel_values"][:, :1], dtype=torch.uint8)
    with pytest.raises(ValueError, match="image_processor"):
        trainer.compute_loss(model, batch)


def test_a_fresh_decoder_starts_at_even_odds(data, tmp_path):
    trainer, _ = train(IntraScaleTrainer, tmp_path, data, max_steps=1)
    first = trainer.state.log_history[0]
    assert first["document_x4/language_loss"] == pytest.approx(math.log(262), abs=0.4)


def test_bf16_keeps_every_term(data, tmp_path):
    trainer, _ = train(IntraScaleTrainer, tmp_path, data, bf16=True, max_steps=2)
    for entry in trainer.state.log_history[:2]:
        assert entry["natural_x1/vision_loss"] > 0
        assert math.isfinite(entry["loss"])


def test_the_teacher_sees_large_pictures_at_x1_and_its_grid_is_the_target(data, tmp_path):
    model, teacher = model_and_teacher()
    trainer = InterScaleTrainer(
        model=model, args=arguments(tmp_path), train_dataset=mixture(data, STAGE_2), teacher=teacher
    )
    batch = trainer.train_dataset[0]["natural_x4"]
    assert batch["pixel_values"].shape[-2:] == (64, 64)
    targets = trainer.teacher_targets(batch["teacher_pixel_values"])
    assert targets["teacher_grid"] == (4, 4)
    with torch.no_grad():
        expected = teacher(batch["teacher_pixel_values"]).last_hidden_state
    torch.testing.assert_close(targets["teacher_features"], expected)
    _, outputs = trainer.compute_loss(model, {"natural_x4": batch}, return_outputs=True)
    assert outputs["natural_x4"].vision_loss.item() > 0


def test_the_share_of_sampled_tokens_is_the_ratio(data, tmp_path):
    model, teacher = model_and_teacher()
    trainer = IntraScaleTrainer(
        model=model, args=arguments(tmp_path, token_sampling_ratio=0.3), train_dataset=mixture(data), teacher=teacher
    )
    masks = [trainer.teacher_targets(torch.zeros(40, 3, 32, 32))["teacher_token_mask"] for _ in range(2)]
    assert masks[0].shape == (40, 17)
    assert masks[0][:, 0].all()  # the class token is always among them
    assert abs(float(masks[0][:, 1:].float().mean()) - 0.3) < 0.06
    assert not torch.equal(masks[0], masks[1])


def test_the_loss_runs_under_data_parallelism(data, tmp_path):
    """Several forward passes a step, and a head that is called outside of them: what wraps the model must bear it."""
    shape = {"num_character_classes": NUM_CHARACTER_CLASSES, "character_slots": 2}
    model, teacher = model_and_teacher(**shape)
    dataset = mixture(data, slots=2)
    trainer = IntraScaleTrainer(
        model=model, args=arguments(tmp_path, character_weight=1.0), train_dataset=dataset, teacher=teacher
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(2):
            model.zero_grad()
            trainer.compute_loss(wrapped, dataset[step]).backward()
            assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    finally:
        torch.distributed.destroy_process_group()


class Given(torch.nn.Module):
    """A model whose outputs are given, one group after another."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)
        self.calls = []

    def forward(self, **inputs):
        self.calls.append(inputs)
        return self.outputs.pop(0)


def test_every_term_of_the_loss_by_hand(data, tmp_path):
    """lambda 2, mu 0.4; documents weigh half; 3 of 5 tokens in C."""
    ln = math.log
    weights = {"vision_weight": 2.0, "vision_l1_weight": 0.4, "language_weight": 3.0}
    settings = arguments(
        tmp_path, **weights, group_weights={"document_x4": 0.5}, character_weight=10.0, alignment_weight=100.0
    )
    model, teacher = model_and_teacher()
    trainer = UnitTrainer(model=model, args=settings, train_dataset=mixture(data), teacher=teacher)
    # four pieces; nothing predicts the picture's first label, its second has odds 3 to 1 to 1 to 1
    logits = torch.tensor([[[ln(3), 0.0, 0.0, 0.0], [0.0] * 4, [7.0, 1.0, 2.0, 3.0]]])
    picture = UnitForPreTrainingOutput(logits=logits, vision_cosine=torch.tensor(0.25), vision_l1=torch.tensor(0.5))
    pictures = {"pixel_values": torch.zeros(1, 3, 16, 16), "labels": torch.tensor([[3, 0, -100]])}
    pictures |= {"teacher_token_mask": torch.tensor([[True, False, True, True, False]])}
    # page: two labels at even odds; a patch with a character (odds 1 to 1) and an empty slot (odds 1 to 1)
    head = torch.nn.Linear(2, 4)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    half = torch.full((1, 1, 3, 3), 0.5)
    page = UnitForPreTrainingOutput(
        logits=torch.zeros(1, 3, 4),
        attentions=(half, half),
        image_features=UnitImageFeatures(patches=torch.zeros(1, 1, 2)),
    )
    pages = {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.tensor([[-100, 1, 2]])}
    pages |= {"character_classes": torch.tensor([[[1, 0]]]), "token_places": torch.tensor([[-1, 0, -1]])}
    stub = Given(picture, page)
    stub.character_head = head
    loss = trainer.compute_loss(stub, {"natural_x1": pictures, "document_x4": pages})
    language = 3.0 * -ln(3 / 6) + 3.0 * 0.5 * ln(4)
    vision = 2.0 * (0.25 + 0.4 * 0.5)
    assert float(loss) == pytest.approx(language + vision + 10.0 * ln(2) + 100.0 * ln(2))
    assert "labels" not in stub.calls[0]  # the shift and the mask are the trainer's
    assert stub.calls[1]["output_attentions"]


def test_a_teacher_of_the_same_scale_sees_large_pictures_as_they_are(data, tmp_path):
    model, teacher = model_and_teacher()
    settings = arguments(tmp_path, teacher_scale="same", token_sampling_ratio=1.0)
    trainer = InterScaleTrainer(model=model, args=settings, train_dataset=mixture(data, STAGE_2), teacher=teacher)
    rows = [picture_row("a dog", seed=seed) for seed in range(2)]
    batch = GroupCollator(processor(), "natural", 4, teacher_scale="same")(rows, None)
    assert "teacher_pixel_values" not in batch
    inputs, _ = trainer.group_inputs("natural_x4", batch)
    assert inputs["teacher_grid"] == (8, 8)  # 64 x 64 pixels; at x1 it would be 4 x 4
    with torch.no_grad():
        torch.testing.assert_close(inputs["teacher_features"], teacher(batch["pixel_values"]).last_hidden_state)
    assert float(trainer.step_counts([{"natural_x4": batch}])["natural_x4", "vision_loss"]) == 2 * (1 + 64)


@pytest.mark.parametrize(("crop", "expected"), [(None, (True, 0.1)), (False, (False, 0.0)), (True, (True, 0.1))])
def test_crops_of_the_positions_are_one_setting(crop, expected, data, tmp_path):
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path, position_crop=crop), train_dataset=mixture(data))
    config = trainer.model.vision_model.config
    assert (config.cpe_crop, config.cpe_drop_prob) == expected
    pixels = torch.rand(1, 3, 32, 32)
    encoder = trainer.model.vision_model
    with torch.no_grad():
        trained, evaluated = encoder.train()(pixels).last_hidden_state, encoder.eval()(pixels).last_hidden_state
    assert torch.equal(trained, evaluated) == (crop is False)


def test_crops_are_not_for_encoders_of_others(data, tmp_path):
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "patch_size": 8}
    model = unit_model(vision=vision | {"num_attention_heads": 2, "intermediate_size": 48, "image_size": 32})
    with pytest.raises(ValueError, match="position_crop: a clip_vision_model does not crop"):
        UnitTrainer(model=model, args=arguments(tmp_path, position_crop=True), train_dataset=mixture(data))


# -- groups, arguments, columns --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "names", "words"),
    [
        (IntraScaleTrainer, ("natural_x1",), r"missing: \['document_x4'\]"),
        (IntraScaleTrainer, STAGE_2, r"not taken: \['document_x1', 'natural_x4'\]"),
        (InterScaleTrainer, STAGE_1, r"missing: \['document_x1', 'natural_x4'\]"),
    ],
)
def test_each_stage_insists_on_its_groups(stage, names, words, data, tmp_path):
    model, teacher = model_and_teacher()
    with pytest.raises(ValueError, match=words):
        stage(model=model, args=arguments(tmp_path), train_dataset=mixture(data, names), teacher=teacher)


def test_missing_labels_are_one_clear_error(data, tmp_path):
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data))
    batch = trainer.train_dataset[0]
    batch["document_x4"].pop("labels")
    with pytest.raises(ValueError, match="'document_x4' has no labels"):
        trainer.compute_loss(model, batch)


def test_a_group_whose_labels_are_all_masked_is_named_with_its_rows(data, tmp_path):
    model, _ = model_and_teacher()
    dataset = mixture(data)
    read = dataset.groups[1].collator  # of the documents

    class Masked(GroupCollator):
        def __call__(self, *args):
            batch = GroupCollator.__call__(self, *args)
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

    read.__class__ = Masked
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset)
    with pytest.raises(
        ValueError, match=r"Step 1: all labels of group 'document_x4' are masked \(rows: .*test/"
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_micro_batch_may_be_masked_as_long_as_the_step_is_not(tmp_path):
    batches = micro_batches(4)
    trainer = steady_trainer(tmp_path, batches, vision_weight=0.0, character_weight=0.0, alignment_weight=0.0)
    alone = float(trainer.compute_loss(trainer.model, {"document_x4": batches[0]["document_x4"]}).detach())
    masked = {"document_x4": dict(batches[1]["document_x4"])}
    masked["document_x4"]["labels"] = torch.full_like(masked["document_x4"]["labels"], -100)
    both = [{"document_x4": batches[0]["document_x4"]}, masked]
    counts = trainer.step_counts(both)
    losses = [float(trainer.compute_loss(trainer.model, each, num_items_in_batch=counts).detach()) for each in both]
    assert losses == [pytest.approx(alone), 0.0]


def test_the_models_own_encoder_is_no_teacher(data, tmp_path):
    model, _ = model_and_teacher()
    for teacher in (model, model.vision_model):
        with pytest.raises(ValueError, match="The teacher is the model's own encoder"):
            IntraScaleTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data), teacher=teacher)
    assert all(each.requires_grad for name, each in model.vision_model.named_parameters())


def test_nothing_is_drawn_for_all_tokens(data, tmp_path):
    model, teacher = model_and_teacher()
    settings = arguments(tmp_path, token_sampling_ratio=1.0)
    trainer = IntraScaleTrainer(model=model, args=settings, train_dataset=mixture(data), teacher=teacher)
    before = trainer._sampler.get_state()
    assert bool(trainer.sampled_tokens(torch.zeros(2, 3, 32, 32)).all())
    assert torch.equal(trainer._sampler.get_state(), before)


@pytest.mark.parametrize("connector", [{}, {"connector": "qformer"}, {"unshuffle": 2}])
@pytest.mark.parametrize("prompt", ["", "Read: "])
def test_every_label_is_learned_from_whatever_the_prompt(prompt, connector, data, tmp_path):
    asked = processor(**connector)
    asked.task_prompts = dict.fromkeys(asked.task_prompts, prompt)
    model, teacher = model_and_teacher(**connector)
    dataset = mixture(data)
    for group in dataset.groups:
        group.collator.processor = asked
    trainer = IntraScaleTrainer(model=model, args=arguments(tmp_path), train_dataset=dataset, teacher=teacher)
    name, batch = next(iter(trainer._prepare_inputs(dataset[0]).items()))
    model.eval()
    with torch.no_grad():
        trainer.compute_loss(model, {name: dict(batch)})
        texts = {key: batch[key] for key in ("input_ids", "pixel_values", "attention_mask", "labels")}
        expected = model(**texts).language_loss
    total, count, _ = trainer.terms.state()[f"{name}/language_loss"]
    assert count == int((batch["labels"] != -100).sum())
    assert total / count == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_of_another_width_is_refused(data, tmp_path):
    model, _ = model_and_teacher()
    teacher = UnitVisionModel(vision_config(hidden_size=16))
    with pytest.raises(ValueError, match="The teacher's width is 16, the vision decoder gives 32"):
        UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data), teacher=teacher)


def test_items_are_whole_micro_batches(data, tmp_path):
    model, _ = model_and_teacher()
    settings = arguments(tmp_path, per_device_train_batch_size=2)
    trainer = UnitTrainer(model=model, args=settings, train_dataset=mixture(data))
    with pytest.raises(ValueError, match="per_device_train_batch_size must be 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_sampling_ratio", 0.0),
        ("token_sampling_ratio", 1.2),
        ("teacher_scale", 4),
        ("vision_weight", -1.0),
        ("vision_l1_weight", -0.1),
        ("language_weight", -0.1),
        ("character_weight", -0.1),
        ("alignment_weight", -0.1),
        ("optimizer", "sgd"),
    ],
)
def test_wrong_arguments_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, **{name: value})


def test_parts_to_freeze_that_do_not_exist_are_refused():
    model, _ = model_and_teacher()
    with pytest.raises(ValueError, match="'decoder'"):
        freeze_parts(model, ["decoder"])


def test_the_defaults_are_the_papers(tmp_path):
    settings = UnitTrainingArguments(output_dir=str(tmp_path))
    # UNIT, arXiv 2409.04095: AdamW, 5e-5, weight decay 0.01, cosine; the auxiliary losses are ours and off
    assert (settings.learning_rate, settings.weight_decay, settings.optimizer) == (5e-5, 0.01, "adamw")
    assert settings.lr_scheduler_type == "cosine"
    assert (settings.character_weight, settings.alignment_weight) == (0.0, 0.0)


def test_micro_batches_come_in_the_order_of_the_plan(data, tmp_path):
    model, _ = model_and_teacher()
    dataset = mixture(data, length=5)
    seen = []
    look_up = type(dataset).__getitem__

    class Watched(MixtureDataset):
        def __getitem__(self, step):
            seen.append(step)
            return look_up(self, step)

    dataset.__class__ = Watched
    UnitTrainer(model=model, args=arguments(tmp_path, max_steps=5), train_dataset=dataset).train()
    assert seen == [0, 1, 2, 3, 4]


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_at_the_same_weights(optimizer, data, tmp_path):
    """Bit by bit: data, crops of the positions, sampled tokens, optimiser and schedule all go on where they were."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optimizer": optimizer}
    straight, _ = train(IntraScaleTrainer, tmp_path, data, **settings)
    torch.manual_seed(99)
    resumed, _ = train(IntraScaleTrainer, tmp_path, data, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert resumed.state.global_step == 4
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    last = [entry for entry in straight.state.log_history if "loss" in entry][-1]
    assert [entry for entry in resumed.state.log_history if "loss" in entry][-1] == last


# -- accumulation and ranks ------------------------------------------------------------------------

WEIGHTS = {"vision_weight": 0.7, "vision_l1_weight": 0.3, "character_weight": 0.4, "alignment_weight": 0.2}
LENGTHS = (1, 24, 3, 20, 2, 22, 1, 9)  # characters: a mean of means is far from the mean over labels
CAPTIONS = (50, 1, 2, 30, 7, 1, 4, 12)


def micro_batches(rows: int, tasks=("ocr",), count: int = 8) -> list[dict]:
    """`count` documents and as many pictures, `rows` of each to a micro-batch, padded alike however they are split."""
    documents = [
        document_row(("ab " * 8)[:length], 96, 16, seed=index) | {"row_seed": index, "task": tasks[index % len(tasks)]}
        for index, length in enumerate(LENGTHS[:count])
    ]
    pictures = [
        picture_row(("a dog" * 10)[:length], seed=index) | {"row_seed": 2**60 + index}
        for index, length in enumerate(CAPTIONS[:count])
    ]
    read, see = GroupCollator(processor(), "document", 4, 2), GroupCollator(processor(), "natural", 1)
    return [
        {
            "document_x4": read(documents[begin : begin + rows], None, (3, 12, 0)),
            "natural_x1": see(pictures[begin : begin + rows], None),
        }
        for begin in range(0, count, rows)
    ]


def steady_trainer(out, batches, **changes) -> IntraScaleTrainer:
    """Every term of the loss, nothing at random."""
    vision = vision_config(num_hidden_layers=1, cpe_crop=False, cpe_drop_prob=0.0)
    shape = {"num_character_classes": NUM_CHARACTER_CLASSES, "character_slots": 2}
    torch.manual_seed(0)
    model = unit_model(vision=vision, text=QWEN3 | {"num_hidden_layers": 2}, **shape)
    model.language_model.set_attn_implementation("eager")
    teacher = UnitVisionModel(vision)
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.0, "gradient_accumulation_steps": len(batches)}
    settings = arguments(out, **(settings | WEIGHTS | changes))
    return IntraScaleTrainer(model=model, args=settings, train_dataset=batches, teacher=teacher)


def gradients_of_a_step(out, batches) -> dict[str, torch.Tensor]:
    """What the optimiser sees in a real run of one step."""
    trainer = steady_trainer(out, batches)
    seen = {}
    step = trainer.create_optimizer().step

    def spy(*args, **kwargs):
        seen.update({name: each.grad.clone() for name, each in trainer.model.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.train()
    return seen


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            given[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: name + text
        )


@pytest.fixture(scope="module")
def large_batch(tmp_path_factory):
    return gradients_of_a_step(tmp_path_factory.mktemp("large"), micro_batches(8))


@pytest.mark.parametrize("rows", [1, 2])
def test_accumulated_micro_batches_give_the_gradients_of_the_large_batch(rows, large_batch, tmp_path):
    assert_same(gradients_of_a_step(tmp_path, micro_batches(rows)), large_batch)


def test_a_mean_of_means_would_be_something_else(large_batch, tmp_path):
    batches = micro_batches(1)
    trainer = steady_trainer(tmp_path, batches)
    for batch in batches:
        (trainer.compute_loss(trainer.model, batch) / len(batches)).backward()
    naive = dict(trainer.model.named_parameters())["connector.fc1.weight"].grad
    exact = large_batch["connector.fc1.weight"]
    assert float((naive - exact).norm() / exact.norm()) > 0.1


def test_two_ranks_give_the_gradients_of_the_large_batch(large_batch, tmp_path):
    """Each rank knows its own micro-batches and the mean of what both count; gradients are averaged, as DDP does."""
    batches = micro_batches(2)
    shares = batches[:3], batches[3:]  # unequal ones
    trainer = steady_trainer(tmp_path, batches)
    told = []
    for share in shares:
        trainer.mean_over_ranks = lambda own: told.append(own) or own
        trainer.step_counts(share)
    trainer.mean_over_ranks = lambda own: (told[0] + told[1]) / 2
    losses = []
    for share in shares:
        counts = trainer.step_counts(share)
        for batch in share:
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
            (loss / 2).backward()
            losses.append(float(loss.detach()))
    assert_same({name: each.grad for name, each in trainer.model.named_parameters()}, large_batch)
    # what is logged is the mean over the ranks of the sum over a rank's micro-batches
    whole = steady_trainer(tmp_path, batches)
    assert sum(losses) / 2 == pytest.approx(
        float(whole.compute_loss(whole.model, micro_batches(8)[0]).detach()), rel=1e-5
    )


def test_counts_of_a_step_by_hand(tmp_path):
    trainer = steady_trainer(tmp_path, micro_batches(2), token_sampling_ratio=1.0)
    counts = {key: float(each) for key, each in trainer.step_counts(micro_batches(2)).items()}
    # bytes and the end of each text
    assert counts["document_x4", "language_loss"] == sum(LENGTHS) + 8
    assert counts["natural_x1", "language_loss"] == sum(CAPTIONS) + 8
    assert counts["natural_x1", "vision_loss"] == 8 * (1 + 4 * 4)  # class token and patches of 32 x 32 pixels
    characters = sum(len(("ab " * 8)[:length].replace(" ", "")) for length in LENGTHS)
    assert counts["document_x4", "alignment_loss"] == characters
    # 3 x 12 patches of two slots: a character lies in each of its slots, the rest weigh a tenth
    assert counts["document_x4", "character_loss"] == pytest.approx(characters + 0.1 * (8 * 3 * 12 * 2 - characters))


def test_logged_terms_are_means_over_all_that_was_counted_between_two_lines(tmp_path):
    batches = micro_batches(2, tasks=("ocr", "markdown"))  # row by row
    trainer = steady_trainer(
        tmp_path, batches, max_steps=2, gradient_accumulation_steps=2, logging_steps=2, learning_rate=0.0
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    # one row after the other through the model's own loss, weighted by its labels
    sums, labels = {}, {}
    for index, batch in enumerate(micro_batches(1, tasks=("ocr", "markdown"))):
        for name, group in batch.items():
            inputs = {key: group[key] for key in ("input_ids", "labels", "attention_mask", "pixel_values")}
            with torch.no_grad():
                loss = float(trainer.model(**inputs).loss)
            count = (LENGTHS if name == "document_x4" else CAPTIONS)[index] + 1
            for key in (name, f"{name}/{('ocr', 'markdown')[index % 2]}"):
                sums[key], labels[key] = sums.get(key, 0.0) + loss * count, labels.get(key, 0) + count
    for name in ("document_x4", "natural_x1"):
        assert entry[f"{name}/language_loss"] == pytest.approx(sums[name] / labels[name], abs=2e-5)
    for task in ("ocr", "markdown"):
        expected = sums[f"document_x4/{task}"] / labels[f"document_x4/{task}"]
        assert entry[f"document_x4/language_loss/{task}"] == pytest.approx(expected, abs=2e-5)
    assert not [key for key in entry if key.startswith("natural_x1/language_loss/")]  # one task only
    expected = entry["document_x4/language_loss"] + entry["natural_x1/language_loss"]
    expected += 0.7 * entry["natural_x1/vision_loss"] + 0.4 * entry["document_x4/character_loss"]
    expected += 0.2 * entry["document_x4/alignment_loss"]
    assert entry["loss"] == pytest.approx(expected, abs=5e-5)


def test_terms_of_several_ranks_are_means_over_what_all_counted(monkeypatch):
    log = TermLog()
    log.add("document_x4/language_loss", Counted(torch.tensor(6.0), torch.tensor(3)), 2.0)
    log.add("document_x4/language_loss", Counted(torch.tensor(2.0), torch.tensor(1)), 2.0)
    log.add("document_x4/language_loss/*", Counted(torch.tensor([8.0, 0.0, 0.0]), torch.tensor([4, 0, 0])))
    other = {
        "document_x4/language_loss": [12.0, 12.0, 2.0],
        "document_x4/language_loss/*": [[0.0, 0.0, 12.0], [0.0, 0.0, 12.0], None],
        "natural_x1/vision_loss": [1.0, 4.0, 0.5],
    }
    assert means(log.gathered()) == {"document_x4/language_loss": 2.0, "loss": 4.0}  # one task: not told apart
    monkeypatch.setattr(training.terms, "gather_object", lambda mine: mine + [other])
    assert means(log.gathered(ranks=2)) == {
        "document_x4/language_loss": 1.25,  # 20 over 16
        "document_x4/language_loss/ocr": 2.0,
        "document_x4/language_loss/markdown": 1.0,
        "natural_x1/vision_loss": 0.25,
        "loss": 2.0 * 1.25 + 0.5 * 0.25,
    }


def test_labels_that_are_masked_are_told_at_the_next_line_of_the_log_at_the_latest(data, tmp_path):
    """On a GPU they are not read at each step."""
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data))
    trainer.log_term("document_x4", "language_loss", Counted(torch.tensor(0.0), torch.tensor(0)), 1.0)
    with pytest.raises(ValueError, match="all labels of group 'document_x4' are masked"):
        trainer.log({"loss": 1.0})


def test_the_terms_of_an_older_checkpoint_are_left_out(data, tmp_path):
    model, _ = model_and_teacher()
    trainer = UnitTrainer(model=model, args=arguments(tmp_path), train_dataset=mixture(data))
    state = trainer.log_state()
    trainer.load_log_state({"guard": state["guard"], "terms": {"document_x4/language_loss": [9.0, 2]}})
    assert not trainer.terms.terms


def test_a_picture_has_its_tokens_of_c_from_its_own_seed(tmp_path):
    """Whatever micro-batch it comes in, alone, padded or packed."""
    trainer = steady_trainer(tmp_path, micro_batches(8))
    pictures = [picture_row("a dog", seed=index) | {"row_seed": 1000 + index} for index in range(3)]

    def masks(rows, **settings):
        batch = {"natural_x1": GroupCollator(processor(), "natural", 1, **settings)(rows, None)}
        trainer.step_counts([batch])
        return batch["natural_x1"]["teacher_token_mask"].reshape(len(rows), 17)

    together = masks(pictures)
    assert together[:, 0].all()  # the class token
    assert len({tuple(each.tolist()) for each in together}) == 3
    for index, picture in enumerate(pictures):
        assert torch.equal(masks([picture])[0], together[index])
    assert torch.equal(masks(pictures[::-1]), together.flip(0))
    assert torch.equal(masks(pictures, packed=True), together)
    uncounted = GroupCollator(processor(), "natural", 1)(pictures, None)
    assert torch.equal(trainer.group_inputs("natural_x1", uncounted)[0]["teacher_token_mask"], together)
    share = torch.cat([masks([picture | {"row_seed": seed}])[:, 1:] for seed in range(200)]).float().mean()
    assert abs(float(share) - 0.5) < 0.03


# -- LoRA ------------------------------------------------------------------------------------------


def test_lora_trains_adapters_connector_and_vision_decoder_only(data, tmp_path):
    model, teacher = model_and_teacher()
    plain_keys, plain = set(model.state_dict()), {name: each.clone() for name, each in model.state_dict().items()}
    wrapped = add_lora(model, LoraArguments(parts=["encoder", "language_decoder"], r=4, alpha=8, dropout=0.0))
    trainer = IntraScaleTrainer(
        model=wrapped, args=arguments(tmp_path), train_dataset=mixture(data, length=3), teacher=teacher
    )
    before = {name: each.clone() for name, each in wrapped.state_dict().items()}
    trainer.train()
    changed = moved(wrapped, before)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert changed == trained
    for name in trained:
        adapter = "lora_" in name and part_of(name) in ("encoder", "language_decoder")
        full = "modules_to_save" in name and part_of(name) in ("connector", "vision_decoder")
        assert adapter or full, name
    adapted = {part_of(name) for name in trained if "lora_" in name}
    assert adapted == {"encoder", "language_decoder"}
    # encoder: qkv, proj, fc1, fc2 of one block; decoder: q, k, v, o, gate, up, down of two layers; A and B each
    assert len([name for name in trained if "lora_" in name]) == 2 * (4 + 2 * 7)

    wrapped.eval()
    batch = trainer.train_dataset[0]["document_x4"]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        adapted_logits = wrapped(**inputs).logits
    merged = wrapped.merge_and_unload()
    assert type(merged) is UnitForPreTraining
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted_logits, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded, report = UnitForPreTraining.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert set(loaded.state_dict()) == plain_keys
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, adapted_logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(loaded.state_dict()["connector.fc1.weight"], plain["connector.fc1.weight"])
    still = "vision_model.embeddings.position_embedding"
    assert torch.equal(loaded.state_dict()[still], plain[still])


@pytest.mark.parametrize("part", ["encoder", "language_decoder"])
def test_adapters_do_not_leak_into_the_other_part(part):
    model, _ = model_and_teacher()
    wrapped = add_lora(model, LoraArguments(parts=[part], r=2))
    assert {part_of(name) for name, _ in wrapped.named_parameters() if "lora_" in name} == {part}


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        # modules of one layer of each architecture that take an adapter: attention's four, the MLP's two or three
        ("clip_vision_model", {"intermediate_size": 48, "image_size": 32}, 6),
        ("siglip_vision_model", {"intermediate_size": 48, "image_size": 32}, 6),
        ("dinov2", {"mlp_ratio": 2, "image_size": 32}, 6),
        ("dinov3_vit", {"intermediate_size": 48, "image_size": 32}, 6),
        ("vit", {"intermediate_size": 48, "image_size": 32}, 6),
    ],
)
def test_lora_finds_the_modules_of_foreign_encoders(name, settings, count):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    model = unit_model(vision={"model_type": name} | shape | settings)
    wrapped = add_lora(model, LoraArguments(parts=["encoder"], r=2))
    names = [each for each, _ in wrapped.named_parameters() if "lora_A" in each]
    assert len(names) == count, names


def test_lora_runs_resume_too(data, tmp_path):
    def run(resume=None):
        model, teacher = model_and_teacher()
        wrapped = add_lora(model, LoraArguments(parts=["encoder"], r=2, dropout=0.1))
        settings = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        trainer = IntraScaleTrainer(
            model=wrapped, args=settings, train_dataset=mixture(data, length=2), teacher=teacher
        )
        trainer.train(resume_from_checkpoint=resume)
        return wrapped.state_dict()

    torch.manual_seed(0)
    straight = run()
    resumed = run(str(tmp_path / "checkpoint-1"))
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


def test_lora_on_a_part_that_takes_none_is_refused():
    with pytest.raises(ValueError, match=r"unknown: \['connector'\]"):
        add_lora(model_and_teacher()[0], LoraArguments(parts=["connector"]))


def test_without_parts_lora_leaves_the_model_alone():
    model, _ = model_and_teacher()
    assert add_lora(model, LoraArguments()) is model
