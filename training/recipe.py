"""Recipes: one YAML file describes a run, from where the weights come to what is saved.

`unit train RECIPE.yaml [key=value ...]` reads it, prints what trains, goes on from the last checkpoint in `output_dir`
when there is one, and writes the trained model to `output_dir`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    set_seed,
)

from modeling_unit import (
    UnitConfig,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitProcessor,
    UnitVisionConfig,
)
from modeling_unit.vision_sources_unit import find_model_type, find_vision_source

from .adapter import ADAPTER, BASE, base_of, is_adapted, merged_on_base, save_adapter, save_base
from .aligned_attention import return_first_head
from .arguments import EvaluationArguments, HeldOutSource, LoraArguments, UnitTrainingArguments
from .checkpoints import first_line, from_rank_0, is_writing_error, last_whole_checkpoint
from .checks import check_bf16, check_nested, check_run, check_teacher, check_types, unknown_key
from .collator import NUM_CHARACTER_CLASSES, GroupCollator
from .curves import write_log
from .data.mixture import GroupPlan, MixtureDataset
from .data.refusals import Refusals
from .data.settings import (
    EXCHANGED_DOCUMENTS,
    CurriculumArguments,
    DataArguments,
    GroupArguments,
    SourceArguments,
    expand_groups,
)
from .data.streaming import StreamDataset, StreamGroup, layout_of
from .devices import check_launch, load_whole_models, speak_once
from .live import LiveArguments, LivePictures, LiveTeacherModel, LiveTeacherTrainer, live_views
from .llava_data import ConversationCollator, Conversations, LlavaTrainer
from .lora import (
    adapted_parts,
    add_lora,
    expand_preset,
    is_lowered,
    is_sharded,
    lower_frozen,
    share_frozen,
    single_scale,
)
from .optim import rate_table
from .publish import check_destination, push_run, take_hub_settings
from .recipe_loader import RecipeLoader
from .reporting import quiet_without_terminal
from .resume import differences, facts_left, facts_of, told_differences
from .samples import HeldOut, held_out
from .teacher import PictureTargets, TeacherModel, TeacherTrainer, load_projection, save_teacher
from .tokenizer import TASK_TOKENS, byte_tokenizer
from .trainer import InterScaleTrainer, IntraScaleTrainer, UnitTrainer, freeze_parts, trainable_table

logger = logging.getLogger(__name__)
STAGES = ("teacher", "intra_scale", "inter_scale", "llava")


@dataclass
class Recipe:
    """What a run is.

    Args:
        stage: `"teacher"` (stage zero), `"intra_scale"` (stage 1), `"inter_scale"` (stage 2), or `"llava"` (a LLaVA
            model that `unit llava` has assembled; `start` is its folder).
        start: folder or Hub id of a full UNIT model to go on from; or of an encoder alone, any that
            `UnitForPreTraining.from_vision_pretrained` takes (CLIP, SigLIP, DINO, ...): then `model` describes the
            rest of a new model around it.
        start_settings: of an encoder as the start: `hidden_act` and `num_attention_heads` of OpenCLIP weights; the
            `revision` of a repository.
        teacher: folder or Hub id of the frozen teacher, an encoder or a UNIT model with one inside. By default the
            encoder named by `start`, as it is before training [paper]. Without `start`, a new model's encoder starts
            from the teacher.
        teacher_settings: of the teacher, as `start_settings`.
        language_decoder: folder or Hub id of a pretrained causal language model, with its tokenizer, for a new model
            (the paper's: `facebook/opt-125m`). Without it, `model.text_config` describes one from scratch, which
            reads and writes bytes.
        model: `connector_config`, `text_config`, ... of a new model, as in [`UnitConfig`]; `vision_config` in stage
            zero.
        image_processor: settings of [`UnitImageProcessor`], in place of those that suit or belong to the start.
        groups: rows of each kind and scale in a micro-batch (stages 1 and 2).
        data: settings of [`DataArguments`] (stages 1 and 2): streaming, curriculum, ranks; or in place of `groups`
            sources with shares of kinds, tasks and exchanged scales.
        pictures, pictures_per_batch: data set and batch of stage zero.
        live: settings of [`LiveArguments`]: stage zero by live distillation, for a GPU; else from cached targets.
        evaluation: settings of [`EvaluationArguments`] (stages 1 and 2): held-out sources that are looked at as
            `training.eval_strategy: steps` and `training.eval_steps` say; see `training/samples.py`.
        conversations, images: data of the stage `llava`: a file in LLaVA's format and the folder of its images, or a
            data set of our schema; see `training/llava_data.py`.
        training: settings of [`UnitTrainingArguments`]. `push_to_hub: true` with `hub_model_id` (`hub_private_repo`,
            `hub_revision`) publishes the model once, at the end, as `unit push` does.
        lora: settings of [`LoraArguments`], or the name of a preset: `encoder`, `decoder`, `both`. The weights saved
            are merged ones; `adapter/` beside them is the adapter alone, for peft, and `base/`, of a new model, what
            it belongs on (see `training/adapter.py`). A recipe with `lora` and no `stage` is of stage 2, which mixes
            the scales.
        threads: CPU threads; 0 leaves torch's choice.
    """

    stage: str
    start: str | None = None
    start_settings: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    teacher_settings: dict[str, Any] = field(default_factory=dict)
    language_decoder: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    image_processor: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    pictures: str | None = None
    pictures_per_batch: int = 64
    live: dict[str, Any] = field(default_factory=dict)
    conversations: str | None = None
    images: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    threads: int = 0


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and lay `key=value` overrides over it (`training.max_steps=100`; values are YAML).

    Raises:
        ValueError: a missing file, no mapping, an unknown key (the nearest known one is suggested), an unknown stage.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe at {path}.")
    try:
        data = yaml.load(path.read_text(), RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping with the key `stage`.")
    for override in overrides or []:
        if isinstance(data.get("lora"), str):  # a preset's name, to which something may be added
            data["lora"] = {"preset": data["lora"]}
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"An override must look like key=value, got {override!r}.")
        place = data
        *parents, last = key.strip().split(".")
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"{key!r} leads into {parent!r}, which is no mapping.")
        try:
            place[last] = yaml.load(value, RecipeLoader)
        except yaml.YAMLError:
            raise ValueError(f"The value in {override!r} is not valid YAML.") from None
    expand_preset(data)
    _check_keys(data, Recipe, "the recipe")
    if data["stage"] not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {data['stage']!r}.")
    _check_keys(data.get("training") or {}, UnitTrainingArguments, "`training`")
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        if (data.get("training") or {}).get(name) is False:  # what YAML takes `no` for
            data["training"][name] = "no"
    _check_keys(data.get("lora") or {}, LoraArguments, "`lora`")
    _check_keys(data.get("live") or {}, LiveArguments, "`live`")
    for group in _list(data.get("groups"), "`groups`"):
        _check_keys(group, GroupArguments, "a group")
        for source in _list(group.get("sources"), "`sources`"):
            _check_source(source)
    settings = data.get("data") or {}
    _check_keys(settings, DataArguments, "`data`")
    _check_keys(settings.get("curriculum") or {}, CurriculumArguments, "`data.curriculum`")
    for source in _list(settings.get("sources"), "`data.sources`"):
        _check_source(source)
    check_nested(data)
    LoraArguments(**(data.get("lora") or {}))
    DataArguments(**{key: value for key, value in settings.items() if value is not None})
    evaluation = data.get("evaluation") or {}
    _check_keys(evaluation, EvaluationArguments, "`evaluation`")
    for source in _list(evaluation.get("sources"), "`evaluation.sources`"):
        _check_source(source, HeldOutSource)
    EvaluationArguments(**evaluation)
    if settings.get("sources") and data.get("groups"):
        raise ValueError("`groups` and `data.sources` say the same in two ways: give one of them.")
    return Recipe(**{key: value for key, value in data.items() if value is not None})


def _list(given: Any, where: str) -> list:
    if given is not None and not isinstance(given, list):
        raise ValueError(f"{where} must be a list, got {given!r}.")
    return given or []


def _check_source(given: dict[str, Any], target: type = SourceArguments) -> None:
    _check_keys(given, target, "a source")
    if not given.get("path") and not given.get("dataset"):
        raise ValueError("a source lacks the key 'path' (or 'dataset').")


def _check_keys(given: dict[str, Any], target: type, where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping, got {given!r}.")
    known = [each.name for each in dataclasses.fields(target)]
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(key, known, where))
    check_types(given, target, where)
    for each in dataclasses.fields(target):
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and each.name not in given:
            raise ValueError(f"{where} lacks the key {each.name!r}.")


def new_image_processor(recipe: Recipe) -> UnitImageProcessor:
    return UnitImageProcessor(**recipe.image_processor)


def with_settings(images: UnitImageProcessor, settings: dict[str, Any]) -> UnitImageProcessor:
    """The image processor of a whole model with some settings changed, `scale_as` for instance.

    Raises:
        ValueError: another patch size, which the model's encoder does not have.
    """
    if not settings:
        return images
    if settings.get("patch_size", images.patch_size) != images.patch_size:
        raise ValueError(
            f"image_processor.patch_size is {settings['patch_size']}, the model's patches are {images.patch_size}."
        )
    own = {key: getattr(images, key) for key in inspect.signature(UnitImageProcessor).parameters if key != "kwargs"}
    return UnitImageProcessor(**(own | settings))


def new_model(recipe: Recipe) -> tuple[UnitForPreTraining, UnitProcessor]:
    """A new model around an encoder, the one named by `start` or else the teacher's: with a pretrained language
    decoder and its tokenizer, or with a decoder from scratch and a byte tokenizer.

    Raises:
        ValueError: no encoder named, one that cannot be the start, a language decoder that cannot be trained with.
    """
    source = recipe.start or recipe.teacher
    if source is None:
        raise ValueError(
            "A new model needs `teacher`, or an encoder as `start`: it starts from the teacher's weights [paper]."
        )
    settings = dict(recipe.model)
    if "vision_config" in settings:
        raise ValueError("`model.vision_config` is for stage zero: here the encoder comes from `start` or `teacher`.")
    if recipe.language_decoder:
        if settings.get("text_config"):
            raise ValueError("`language_decoder` is pretrained and has its own text_config: leave out one of the two.")
        tokenizer = pretrained_tokenizer(recipe.language_decoder)
        prompts = None  # words, which a pretrained decoder understands
    else:
        tokenizer, prompts = byte_tokenizer(), TASK_TOKENS
        text_config = dict(settings.pop("text_config", None) or {"model_type": "opt"})
        text_config |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        text_config |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        settings["text_config"] = text_config
    found = find_vision_source(source, **_encoder_settings(recipe, "start" if recipe.start else "teacher"))
    images = UnitImageProcessor.from_vision_pretrained(found, **recipe.image_processor)
    if images.patch_size != found.config.patch_size:
        raise ValueError(
            f"image_processor.patch_size is {images.patch_size}, the encoder's patches are {found.config.patch_size}."
        )
    processor = UnitProcessor(images, tokenizer, task_prompts=prompts)
    projection = load_projection(source)
    model = UnitForPreTraining.from_vision_pretrained(
        found,
        language_decoder=recipe.language_decoder,
        image_token_id=processor.image_token_id,
        projection_dim=0 if projection is None else projection.shape[0],
        num_character_classes=NUM_CHARACTER_CLASSES if recipe.training.get("character_weight") else 0,
        **settings,
    )
    if projection is not None:
        with torch.no_grad():
            model.visual_projection.weight.copy_(projection)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 512
    # a placeholder among the pieces read would ask for an image that is not there
    model.generation_config.suppress_tokens = [model.config.image_token_id]
    connector = model.config.connector_config
    processor.unshuffle = connector.unshuffle
    processor.num_queries = connector.num_queries if connector.connector_type == "qformer" else None
    return model, processor


def _encoder_settings(recipe: Recipe, which: str) -> dict[str, Any]:
    """`start_settings` or `teacher_settings`."""
    return getattr(recipe, f"{which}_settings")


def pretrained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained language decoder, padding with its end-of-text token where it has no padding.

    Raises:
        ValueError: none is there, or it has no end-of-text token, or cannot say where its pieces stand in the text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"language_decoder {source}: its tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"language_decoder {source}: a fast tokenizer (tokenizer.json) is needed.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"language_decoder {source}: its tokenizer has no end-of-text token to stop reading with.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def main(path: str | Path, overrides: list[str] | None = None, accept_changes: bool = False) -> Path:
    """Run a recipe, or go on with it; returns the folder of the trained model.

    Args:
        accept_changes: go on from a checkpoint of a recipe that differs (see `training/resume.py`).

    Raises:
        ValueError: a recipe that makes no sense, or is not the one that the folder's run began with; a run that has
            lost its way ([`RunStopped`]); a checkpoint that could not be written ([`CheckpointError`]).
    """
    recipe = read_recipe(path, overrides)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    settings = {"report_to": "none", "remove_unused_columns": False, "per_device_train_batch_size": 1}
    settings |= {"dataloader_num_workers": 0, "label_names": ["labels"], "save_total_limit": 2}
    # several forward passes a step, none with every parameter: over many devices the search for unused ones would trip
    settings["ddp_find_unused_parameters"] = False
    settings["use_cpu"] = not torch.accelerator.is_available()  # bf16 on a CPU must be asked for
    training, hub = take_hub_settings(recipe.training)
    if hub.get("push_to_hub") and recipe.stage == "llava":
        raise ValueError("training.push_to_hub: a LLaVA model is not published by this package; push its folder.")
    check_bf16(settings | training)
    try:
        arguments = UnitTrainingArguments(**(settings | training))
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith("training.") else f"training: {told}") from error
    check_launch(arguments)
    load_whole_models(arguments)
    speak_once(arguments)
    if arguments.max_steps <= 0:
        raise ValueError("A recipe needs training.max_steps: the mixture has no end of its own.")
    _check_evaluation(recipe, arguments)
    if hub.get("push_to_hub"):
        check_destination(hub)  # before the work, not after it
    quiet_without_terminal()
    set_seed(arguments.seed)
    started = time.time()
    say = print_line if arguments.process_index == 0 else _say_nothing
    checkpoint = from_rank_0(arguments, lambda: last_whole_checkpoint(arguments.output_dir, say))
    facts = facts_of(recipe, _micro_batches(arguments) // arguments.max_steps)
    if changed := differences(facts_left(arguments.output_dir, checkpoint), facts):
        if not accept_changes:
            raise ValueError(
                f"{arguments.output_dir} holds a run of another recipe ({told_differences(changed)}): give another "
                "training.output_dir, or --accept-changes to go on with it all the same."
            )
        say(f"The recipe has changed: {told_differences(changed)}")
    if checkpoint:  # the plan stays as it was laid out, also over another number of processes
        layout = layout_of(checkpoint)
        before, now = layout.pop("batches_per_step", 0), _micro_batches(arguments) // arguments.max_steps
        if before and before != now:
            say(
                f"{checkpoint} took {before} micro-batches a step and this run takes {now}: rows do not come as they "
                "would have. Keep the product of processes and gradient_accumulation_steps to go on exactly."
            )
        recipe.data = layout | {key: value for key, value in recipe.data.items() if value}
    check_run(recipe, arguments, path, overrides, going_on=checkpoint is not None)
    sharded = any(os.environ.get(f"ACCELERATE_USE_{each}") for each in ("FSDP", "DEEPSPEED"))
    planned = recipe.stage in ("intra_scale", "inter_scale") and arguments.process_index == 0 and not checkpoint
    if arguments.device.type == "cuda" and planned and not sharded:
        from .plan import check_fits  # it reads recipes itself

        check_fits(path, overrides, max(1, arguments.world_size))
    run = {"teacher": _teacher_run, "llava": _llava_run}.get(recipe.stage, _stage_run)
    with arguments.main_process_first(desc="data and start"):  # what is fetched or built is so once
        trainer, finish = run(recipe, arguments)
    say(trainable_table(trainer.model))
    say(rate_table(trainer.model, arguments))
    if checkpoint:
        say(f"Going on from {checkpoint}")
    out = Path(arguments.output_dir)
    trainer.facts, trainer.log_path = facts, out / "log.jsonl"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = trainer.whole_model()  # of all processes, where it lies in parts
    if trainer.is_world_process_zero():
        try:
            finish(trained, out)
            write_log(out, recipe, trainer.state.log_history, time.time() - started)
        except Exception as error:
            if not is_writing_error(error):
                raise
            raise ValueError(
                f"The model could not be written to {out}: {first_line(error)}. The same command goes on from the "
                "last checkpoint once the folder can be written to."
            ) from error
    refusals = trainer.refusals() if isinstance(trainer, UnitTrainer) else None
    if refusals is not None and trainer.is_world_process_zero():
        (out / "refusals.json").write_text(json.dumps(refusals.as_dict(), indent=1))
        if refusals.refused:
            print(f"Rows left out:\n{refusals}", flush=True)
    say(f"Saved to {out}")
    if hub.get("push_to_hub") and trainer.is_world_process_zero():
        push_run(out, hub)
    return out


def _check_evaluation(recipe: Recipe, arguments: UnitTrainingArguments) -> None:
    """Whether an evaluation has something to look at, and what is given is looked at."""
    wanted = arguments.eval_strategy != "no" or arguments.eval_on_start
    if wanted and recipe.stage not in ("intra_scale", "inter_scale"):
        raise ValueError(f"training.eval_strategy: the stage {recipe.stage} has nothing to evaluate: leave it out.")
    if wanted and not recipe.evaluation.get("sources"):
        raise ValueError("training.eval_strategy: give held-out rows to look at, `evaluation` with `sources`.")
    if recipe.evaluation and not wanted and "eval_strategy" not in recipe.training:
        raise ValueError(
            "`evaluation` is given: say when, with training.eval_strategy: steps and training.eval_steps."
        )


def print_line(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    pass


def _micro_batches(arguments: UnitTrainingArguments) -> int:
    """Micro-batches that a run looks at, on all devices together: none comes twice."""
    return arguments.max_steps * arguments.gradient_accumulation_steps * max(1, arguments.world_size)


def _teacher_run(recipe: Recipe, arguments: UnitTrainingArguments):
    processor = new_image_processor(recipe)
    config = UnitVisionConfig(**recipe.model.get("vision_config", {}))
    pictures = recipe.pictures or "pictures-train"
    length = _micro_batches(arguments)
    if recipe.live:
        settings = LiveArguments(**recipe.live)
        views = live_views(
            pictures, settings, processor.image_mean, processor.image_std, arguments.device, arguments.seed
        )
        model = LiveTeacherModel(config, imagenet_width=views.classifier.width)
        data = LivePictures(len(views.store.rgba), recipe.pictures_per_batch, length, arguments.seed)
        trainer = LiveTeacherTrainer(model=model, args=arguments, train_dataset=data, views=views)
    else:
        model = TeacherModel(config)
        data = PictureTargets(pictures, processor, recipe.pictures_per_batch, length, arguments.seed)
        trainer = TeacherTrainer(model=model, args=arguments, train_dataset=data)

    def finish(model: TeacherModel, out: Path) -> None:
        save_teacher(model, out)
        processor.save_pretrained(out)

    return trainer, finish


def _stage_run(recipe: Recipe, arguments: UnitTrainingArguments):
    is_whole = recipe.start is not None and find_model_type(recipe.start) == UnitConfig.model_type
    if is_whole:
        if recipe.language_decoder or recipe.model or recipe.start_settings:
            raise ValueError(
                f"`start` {recipe.start} is a whole UNIT model: `language_decoder`, `model` and `start_settings` are "
                "for a new one around an encoder."
            )
        overrides = {}
        if not arguments.character_weight:
            overrides["num_character_classes"] = 0  # the auxiliary head is thrown away with its loss
        elif not UnitConfig.from_pretrained(recipe.start).num_character_classes:
            overrides["num_character_classes"] = NUM_CHARACTER_CLASSES
            if arguments.process_index == 0:
                print_line(f"{recipe.start} has no character head, as what is exported has none: a new one begins.")
        # an exported model is in bfloat16, in which small steps would be lost
        model = AutoModelForPreTraining.from_pretrained(recipe.start, dtype=torch.float32, **overrides)
        processor = AutoProcessor.from_pretrained(recipe.start)
        processor.image_processor = with_settings(processor.image_processor, recipe.image_processor)
        base = base_of(recipe.start)
    else:
        model, processor = new_model(recipe)
        base = None  # nowhere yet
    if arguments.alignment_weight:
        return_first_head(model.language_model)
    teacher = None
    if arguments.vision_weight:
        if recipe.teacher is None and is_whole:
            raise ValueError("`teacher` is missing: L_vis needs the frozen teacher (or set training.vision_weight=0).")
        if recipe.teacher is None:
            teacher = model.make_teacher()
        else:
            found = find_vision_source(recipe.teacher, **_encoder_settings(recipe, "teacher"))
            teacher = found.load(torch.float32)
        check_teacher(teacher.config, model.config)
    data = stage_data(recipe, arguments, processor, model.config)
    held = _held_out(recipe, arguments, processor, model.config)
    lora = LoraArguments(**recipe.lora)
    model = add_lora(model, lora)
    if model.config.projection_dim:
        freeze_parts(model, ["projection"])  # the teacher's, kept as it is
    freeze_parts(model, arguments.freeze)
    groups = [(group.arguments.kind, group.arguments.scale) for group in data.groups]
    warning = single_scale(groups, adapted_parts(lora, model)) if lora.warn_single_scale else None
    if warning and arguments.process_index == 0:
        print_line(warning)
    lowered = is_lowered(lora, arguments)
    if lowered and base is None:  # while its weights are whole
        folder = Path(arguments.output_dir) / BASE
        if arguments.should_save and not folder.is_dir():
            save_base(model, processor, folder)
        base = str(folder.resolve()), None
    stage = IntraScaleTrainer if recipe.stage == "intra_scale" else InterScaleTrainer
    trainer = stage(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=held,
        teacher=teacher,
        image_processor=processor.image_processor,
    )
    if lowered:
        lower_frozen(model)
    if trainer.teacher is not None and not is_sharded(arguments):
        share_frozen(trainer.teacher, model)

    def finish(model: UnitForPreTraining, out: Path) -> None:
        model.language_model.set_attn_implementation("sdpa")
        if is_adapted(model) and arguments.should_save:
            save_adapter(model, out / ADAPTER, *(base or base_of(save_base(model, processor, out / BASE))))
        if lowered:
            classes = {"num_character_classes": model.config.num_character_classes}
            merged = merged_on_base(out / ADAPTER, *base, UnitForPreTraining.__name__, **classes)
            merged.generation_config = model.generation_config
        else:
            merged = model.merge_and_unload() if is_adapted(model) else model
        merged.save_pretrained(out)
        processor.save_pretrained(out)

    return trainer, finish


def data_settings(recipe: Recipe) -> DataArguments:
    """The data of stage 1 or 2 as a whole."""
    return DataArguments(**{key: value for key, value in recipe.data.items() if value is not None})


def groups_of(recipe: Recipe, images: UnitImageProcessor) -> list[GroupArguments]:
    """The groups of stage 1 or 2, given or worked out from shares."""
    settings = data_settings(recipe)
    if settings.sources:
        patches = {scale: images.area(scale) / images.patch_size**2 for scale in (1, 4)}
        return expand_groups(settings, recipe.stage, patches)
    return [
        GroupArguments(**(group | {"sources": [SourceArguments(**each) for each in group.get("sources", [])]}))
        for group in recipe.groups
    ]


def _held_out(
    recipe: Recipe, arguments: UnitTrainingArguments, processor: UnitProcessor, config: UnitConfig
) -> HeldOut | None:
    if arguments.eval_strategy == "no" and not arguments.eval_on_start:
        return None
    say = print_line if arguments.process_index == 0 else _say_nothing
    groups = groups_of(recipe, processor.image_processor)
    slots = config.character_slots if arguments.character_weight else 0
    settings = EvaluationArguments(**recipe.evaluation)
    return held_out(settings, processor, config, groups, slots, say, arguments.teacher_scale)


def stage_data(
    recipe: Recipe, arguments: UnitTrainingArguments, processor: UnitProcessor, config: UnitConfig
) -> MixtureDataset | StreamDataset:
    """The micro-batches of stage 1 or 2, of this process where they are streamed.

    Raises:
        ValueError: sources that are not there or have no row that may come, processes that do not suit the plan.
    """
    settings, groups = data_settings(recipe), groups_of(recipe, processor.image_processor)
    world = max(1, arguments.world_size)
    batches_per_step = arguments.gradient_accumulation_steps * world
    length = _micro_batches(arguments)
    slots = config.character_slots if arguments.character_weight else 0
    positions = getattr(config.text_config, "max_position_embeddings", None) or 0
    refusals = Refusals()
    collators = [
        GroupCollator(
            processor,
            each.kind,
            each.scale,
            slots,
            raw=not each.packed,
            packed=each.packed,
            augment_pictures=settings.augment_pictures,
            keyed=bool(arguments.teacher_cache),
            teacher_scale=arguments.teacher_scale,
        )
        for each in groups
    ]
    pairs = list(zip(groups, collators, strict=True))
    if settings.streaming:
        streamed = [StreamGroup(*pair, settings, arguments.seed, positions, refusals) for pair in pairs]
        data = StreamDataset(
            streamed,
            settings,
            length,
            seed=arguments.seed,
            rank=arguments.process_index,
            world=world,
            workers=arguments.dataloader_num_workers,
            batches_per_step=batches_per_step,
            refusals=refusals,
        )
    else:
        ranks = settings.ranks or world
        if ranks % world:
            raise ValueError(f"data.ranks={ranks} must be a multiple of the {world} processes.")
        plans = [
            GroupPlan(
                *pair,
                arguments.seed,
                ranks=ranks,
                curriculum=settings.curriculum,
                batches_per_step=batches_per_step,
                max_positions=positions,
                min_x_height=settings.exchanged_x_height if pair[0].name == EXCHANGED_DOCUMENTS else 0.0,
                refusals=refusals,
            )
            for pair in pairs
        ]
        data = MixtureDataset(plans, length)
    if refusals.refused and arguments.process_index == 0:
        print(f"Rows left out:\n{refusals}", flush=True)
    return data


def _llava_run(recipe: Recipe, arguments: UnitTrainingArguments):
    for key in ("start", "conversations"):
        if getattr(recipe, key) is None:
            raise ValueError(f"The stage llava needs `{key}`.")
    model = LlavaForConditionalGeneration.from_pretrained(recipe.start, dtype=torch.float32, use_safetensors=True)
    processor = LlavaProcessor.from_pretrained(recipe.start)
    base = base_of(recipe.start)
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    data = Conversations(recipe.conversations, recipe.images)
    lora = LoraArguments(**recipe.lora)
    model = add_lora(model, lora)
    freeze_parts(model, arguments.freeze)
    trainer = LlavaTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=ConversationCollator(processor, longest)
    )
    lowered = is_lowered(lora, arguments)
    if lowered:
        lower_frozen(model)

    def finish(model: LlavaForConditionalGeneration, out: Path) -> None:
        if is_adapted(model) and arguments.should_save:
            save_adapter(model, out / ADAPTER, *base)
        if lowered:
            merged = merged_on_base(out / ADAPTER, *base, LlavaForConditionalGeneration.__name__)
        else:
            merged = model.merge_and_unload() if is_adapted(model) else model
        merged.save_pretrained(out)
        processor.save_pretrained(out)

    return trainer, finish
