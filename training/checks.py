"""What is wrong with a recipe, said in one line before any weight is loaded and before anything is written.

`unit train` calls [`check_bf16`] and then [`check_run`] once; `read_recipe` calls [`check_nested`], so that
`unit plan` refuses the same keys. Everything here is told from the recipe, from configurations and from the heads of
files: seconds at most, also for the largest model.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from modeling_unit import UnitConfig, UnitImageProcessor, UnitProcessor
from modeling_unit.architectures_unit import prefix_tokens
from modeling_unit.configuration_unit import UnitConnectorConfig, UnitVisionConfig, UnitVisionDecoderConfig
from modeling_unit.vision_sources_unit import find_model_type

from .adapter import check_continued
from .arguments import LoraArguments, UnitTrainingArguments
from .collator import TEXT_STEP
from .data.mixture import find_shards
from .data.settings import KINDS, GroupArguments, SourceArguments
from .llava_data import IGNORED, ConversationCollator, Conversations
from .lora import is_lowered
from .optim import parameter_groups
from .tokenizer import TASK_TOKENS, byte_tokenizer

if TYPE_CHECKING:
    from .recipe import Recipe

TWO_STAGES = ("intra_scale", "inter_scale")
GIB = 2**30
# Ours: of vocabularies that are padded to round numbers the tokenizers fill 97% and more; one that fills less than
# half belongs to another model
LEAST_FILLED = 0.5
# Ours: the plan's own tolerance, as of a GPU
TOLERANCE = 1.15
LOOKED_AT = 4  # conversations, for labels


# -- keys and types -----------------------------------------------------------------------------------------------


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """One line about a key that nothing reads, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known[:12])}{' ...' * (len(known) > 12)}"
    return f"Unknown key {key!r} in {where}.{hint}"


def check_nested(data: Mapping[str, Any]) -> None:
    """The mappings of a recipe that become other classes' arguments, most of which swallow unknown keys: `model` and
    its configurations, `image_processor`, `start_settings`, `teacher_settings`.

    Raises:
        ValueError: an unknown key, a mapping that is none.
    """
    for name in ("start_settings", "teacher_settings"):
        _check(data.get(name), ("hidden_act", "num_attention_heads", "revision"), f"`{name}`")
    images = [each for each in inspect.signature(UnitImageProcessor).parameters if each != "kwargs"]
    _check(data.get("image_processor"), images, "`image_processor`")
    model = data.get("model")
    inherited = {each.name for each in dataclasses.fields(PreTrainedConfig)}
    _check(model, _fields(UnitConfig, inherited), "`model`")
    for name, kind in (
        ("vision_config", UnitVisionConfig),
        ("connector_config", UnitConnectorConfig),
        ("vision_decoder_config", UnitVisionDecoderConfig),
        ("text_config", None),
    ):
        given = (model or {}).get(name)
        if kind is None and isinstance(given, dict):
            asked = given.get("model_type", "opt")
            if asked not in CONFIG_MAPPING:
                near = difflib.get_close_matches(str(asked), CONFIG_MAPPING, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"`model.text_config` has the model_type {asked!r}, which transformers lacks.{hint}")
            kind = CONFIG_MAPPING[asked]
        if given is not None:
            known = _fields(kind, inherited - {"dtype"}) if kind is not None else ()
            _check(given, [*known, "model_type"], f"`model.{name}`")


def _fields(kind: type, without: Iterable[str]) -> list[str]:
    named = [each.name for each in dataclasses.fields(kind) if each.name not in without]
    return [*named, *getattr(kind, "attribute_map", {})]


def _check(given: Any, known: Iterable[str], where: str) -> None:
    if given is None:
        return
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping, got {given!r}.")
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(key, known, where))


WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
WORDS |= {"list[str]": "a list, as [encoder]", "dict[str, float]": "numbers by name, as {encoder: 0.5}"}


def check_types(given: Mapping[str, Any], target: type, where: str) -> None:
    """Values of a dataclass's fields that are a plain number, truth value or text, a list of texts, numbers by name.

    Raises:
        ValueError: `rows: two`.
    """
    for each in dataclasses.fields(target):
        value = given.get(each.name)
        name = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", "")
        if value is None or name not in WORDS:
            continue
        truth = isinstance(value, bool)
        fits = {
            "int": isinstance(value, int) and not truth,
            "float": isinstance(value, (int, float)) and not truth,
            "bool": truth,
            "str": isinstance(value, str),
            "list[str]": isinstance(value, list) and all(isinstance(one, str) for one in value),
            "dict[str, float]": isinstance(value, dict)
            and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value.values()),
        }
        if not fits[name]:
            raise ValueError(f"{where}.{each.name} must be {WORDS[name]}, got {value!r}.")


# -- settings -----------------------------------------------------------------------------------------------------


def check_bf16(training: Mapping[str, Any]) -> None:
    """`training.bf16` on a GPU without it; a CPU without it computes the same, slowly.

    Raises:
        ValueError: such a GPU.
    """
    if not training.get("bf16") or training.get("use_cpu") or not torch.cuda.is_available():
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"training.bf16: {torch.cuda.get_device_name()} does not compute in bfloat16; take training.bf16=false."
        )


def check_run(
    recipe: Recipe,
    arguments: UnitTrainingArguments,
    path: str | Path,
    overrides: list[str] | None = None,
    going_on: bool = False,
) -> None:
    """Refuse a run that cannot come to anything, before it begins.

    Args:
        path, overrides: of the recipe. going_on: from a checkpoint, so that its disk space is taken already.

    Raises:
        ValueError: in one line what is wrong and what to do.
    """
    from .plan import written_beside

    trial = any(each.startswith("training.max_steps=") for each in overrides or [])
    check_schedule(recipe, arguments, trial)
    for name in ("start", "teacher", "language_decoder"):
        given = getattr(recipe, name)
        path_like = given is not None and (Path(given).is_absolute() or given.count("/") > 1 or given[0] in ".~")
        if path_like and not Path(given).exists():
            writer = written_beside(Path(path)).get(given)
            first = f" Run {writer[1]} first, which writes it." if writer else ""
            raise ValueError(f"{name}: there is no {given}.{first}")
    if recipe.stage == "llava":
        check_llava(recipe)
        is_lowered(LoraArguments(**recipe.lora), arguments)
    elif recipe.stage in TWO_STAGES:
        check_stage(recipe, arguments, Path(path), overrides or [], going_on)
    check_output(arguments.output_dir)


def check_schedule(recipe: Recipe, arguments: UnitTrainingArguments, trial: bool = False) -> None:
    """Rates, steps and weights with which nothing would be learnt.

    Args:
        trial: `max_steps` was given with the command, as for a few steps of a long recipe: a warm-up that is longer
            is said and not refused.

    Raises:
        ValueError: such a setting.
    """
    if not arguments.learning_rate > 0:
        raise ValueError(f"training.learning_rate must be above 0, got {arguments.learning_rate:g}.")
    if arguments.optimizer == "muon" and not arguments.muon_learning_rate > 0:
        raise ValueError(f"training.muon_learning_rate must be above 0, got {arguments.muon_learning_rate:g}.")
    if arguments.warmup_steps > arguments.max_steps:
        line = (
            f"training.warmup_steps ({arguments.warmup_steps:g}) is more than training.max_steps "
            f"({arguments.max_steps}): the learning rate never arrives."
        )
        if not trial:
            raise ValueError(line)
        if arguments.process_index == 0:
            print(line, flush=True)
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"training.{name} must be 1 or more, got {getattr(arguments, name)}.")
    if recipe.stage != "llava" and arguments.per_device_train_batch_size != 1:
        raise ValueError(
            "training.per_device_train_batch_size must be 1: an item of the mixture is a whole micro-batch; its size "
            "is `rows` or `patches` of a group."
        )
    weights = ("language_weight", "vision_weight", "character_weight", "alignment_weight")
    if recipe.stage in TWO_STAGES and not any(getattr(arguments, name) for name in weights):
        raise ValueError("training: every weight of the loss is 0, there is nothing to learn.")


def check_output(folder: str | Path) -> None:
    """Whether a folder can be made, or written into.

    Raises:
        ValueError: it cannot.
    """
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"training.output_dir {folder} cannot be written to: {there}: {error.strerror}.") from None


def _existing(folder: str | Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = Path(folder).absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


# -- the two stages -----------------------------------------------------------------------------------------------


def check_stage(
    recipe: Recipe, arguments: UnitTrainingArguments, path: Path, overrides: list[str], going_on: bool
) -> None:
    """Stage 1 or 2: model, teacher, tokenizer, groups, data, memory, disk.

    Raises:
        ValueError: in one line what does not go together.
    """
    from .plan import describe, empty_models
    from .recipe import groups_of

    if recipe.start is None and recipe.teacher is None:
        return  # `new_model` says so itself
    whole = recipe.start is not None and find_model_type(recipe.start) == UnitConfig.model_type
    if recipe.stage == "inter_scale" and not whole and not (recipe.model or recipe.language_decoder):
        named = recipe.start or recipe.teacher
        raise ValueError(
            f"{named} is no UNIT model with a connector and a language decoder, which stage 2 goes on with: give the "
            "folder of stage 1 as `start` (or `model` or `language_decoder` for a new one)."
        )
    if recipe.start is not None and whole and (recipe.language_decoder or recipe.model or recipe.start_settings):
        return  # a contradiction that `_stage_run` words
    if whole and arguments.vision_weight and recipe.teacher is None:
        return  # likewise
    if not whole and (
        "vision_config" in recipe.model or (recipe.language_decoder and recipe.model.get("text_config"))
    ):
        return  # likewise, of `new_model`
    decoder = recipe.language_decoder
    if decoder is not None and Path(decoder).is_dir() and find_model_type(decoder) is None:
        raise ValueError(f"language_decoder {decoder}: no language model there (no config.json with a model_type).")
    try:
        described = describe(recipe, path)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the strict configurations of transformers have an error class of their own
        raise ValueError(f"`model` makes no sense: {_one_line(error)}") from error
    config, images = described.config, described.images
    if images.patch_size != config.vision_config.patch_size:
        raise ValueError(
            f"image_processor.patch_size is {images.patch_size}, the encoder's patches are "
            f"{config.vision_config.patch_size}."
        )
    check_sizes(config)
    check_alignment(config, arguments)
    if described.teacher is not None:
        check_teacher(described.teacher, config)
        check_teacher_grid(described.teacher, images)
    lora = LoraArguments(**recipe.lora)
    if lora.adapter:
        check_continued(lora.adapter, recipe.start)
    is_lowered(lora, arguments)
    groups = groups_of(recipe, images)
    check_groups(groups, recipe.stage, arguments)
    if recipe.language_decoder or not whole:
        from .recipe import pretrained_tokenizer

        tokenizer = pretrained_tokenizer(recipe.language_decoder) if recipe.language_decoder else byte_tokenizer()
        processor = UnitProcessor(images, tokenizer, task_prompts=None if recipe.language_decoder else TASK_TOKENS)
        config.image_token_id = processor.image_token_id
        connector = config.connector_config
        processor.unshuffle = connector.unshuffle
        processor.num_queries = connector.num_queries if connector.connector_type == "qformer" else None
    else:
        processor = AutoProcessor.from_pretrained(recipe.start)
    check_tokenizer(processor, config)
    check_positions(groups, processor, config)
    check_sources(groups, reads=arguments.language_weight > 0)
    try:
        model, teacher = empty_models(described, recipe, arguments)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"`model` cannot be built: {type(error).__name__}: {_one_line(error)}") from error
    trained = parameter_groups(model, arguments.learning_rate, arguments.weight_decay, arguments.part_rates)
    if not trained:
        raise ValueError("Nothing trains: all parts are under training.freeze, or have no adapter.")
    if not going_on:
        check_disk(model, arguments, adapters=lora.adapts)
    if arguments.device.type == "cpu" and arguments.process_index == 0:
        check_memory(model, teacher, arguments, recipe, described, path, overrides)


def check_sizes(config: UnitConfig) -> None:
    """Widths of the language decoder and the connector that their heads must divide.

    Raises:
        ValueError: they do not.
    """
    text, connector = config.text_config, config.connector_config
    width, heads = (getattr(text, name, None) for name in ("hidden_size", "num_attention_heads"))
    if width and heads and not getattr(text, "head_dim", None) and width % heads:
        raise ValueError(f"text_config.hidden_size ({width}) must be a multiple of its num_attention_heads ({heads}).")
    groups = getattr(text, "num_key_value_heads", None)
    if heads and groups and heads % groups:
        raise ValueError(
            f"text_config.num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})."
        )
    if connector.connector_type == "qformer":
        inner = connector.hidden_size or width
        if inner and inner % connector.num_attention_heads:
            raise ValueError(
                f"connector_config: the Q-Former's width ({inner}) must be a multiple of its num_attention_heads "
                f"({connector.num_attention_heads})."
            )


def check_alignment(config: UnitConfig, arguments: UnitTrainingArguments) -> None:
    """Whether the alignment loss has visual tokens that show a place of the page, and a decoder that looks at them.

    Raises:
        ValueError: it would count nothing.
    """
    if not arguments.alignment_weight:
        return
    connector = config.connector_config
    if connector.connector_type != "mlp" or connector.unshuffle != 1:
        raise ValueError(
            "training.alignment_weight needs one visual token a patch (connector_type: mlp, unshuffle: 1): set it to "
            "0."
        )
    if not arguments.language_weight:
        raise ValueError("training.alignment_weight teaches the language decoder: it needs a language_weight above 0.")


def check_teacher(teacher: PreTrainedConfig, config: UnitConfig) -> None:
    """Whether the vision decoder's output can be compared with the teacher's tokens.

    Raises:
        ValueError: another width, other prefix tokens.
    """
    if teacher.hidden_size != config.vision_decoder_config.output_size:
        raise ValueError(
            f"The teacher's width is {teacher.hidden_size}, the vision decoder gives "
            f"{config.vision_decoder_config.output_size}: set model.vision_decoder_config.output_size."
        )
    if prefix_tokens(teacher) != config.num_prefix_tokens:
        raise ValueError(
            f"The teacher puts {prefix_tokens(teacher)} class and register tokens in front of its patch "
            f"tokens, the encoder {config.num_prefix_tokens}: L_vis compares them token by token."
        )


def check_teacher_grid(teacher: PreTrainedConfig, images: UnitImageProcessor) -> None:
    """Whether a picture at x1 is whole patches of the teacher.

    Raises:
        ValueError: it is not.
    """
    side = round(images.area(1) ** 0.5)
    rows, cols = images.grid_for(side, side, "natural", 1)
    if rows * images.patch_size % teacher.patch_size or cols * images.patch_size % teacher.patch_size:
        raise ValueError(
            f"A picture at x1 is {rows * images.patch_size} x {cols * images.patch_size} pixels, which the teacher's "
            f"patches of {teacher.patch_size} do not divide: choose another image_processor.base_size."
        )


def check_groups(groups: list[GroupArguments], stage: str, arguments: UnitTrainingArguments) -> None:
    """Kinds, scales, sizes and weights of the groups, and that the stage has those that it needs.

    Raises:
        ValueError: what is wrong, with the group.
    """
    from .trainer import InterScaleTrainer, IntraScaleTrainer

    for group in groups:
        if group.kind not in KINDS:
            raise ValueError(f"A group's kind must be natural or document, got {group.kind!r}.")
        if group.scale not in (1, 4):
            raise ValueError(f"A group's scale must be 1 or 4, got {group.scale!r}.")
        if group.rows < 0 or group.patches < 0 or bool(group.rows) == bool(group.patches):
            raise ValueError(
                f"Group {group.name}: give either rows or patches, above 0; got rows {group.rows}, patches "
                f"{group.patches}."
            )
        weights = [source.weight for source in group.sources]
        if not weights or min(weights) < 0 or not sum(weights):
            raise ValueError(f"Group {group.name}: needs at least one source, weights must not be negative.")
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"Each kind and scale may be given once, got {', '.join(names)}.")
    trainer = IntraScaleTrainer if stage == "intra_scale" else InterScaleTrainer
    missing, extra = trainer.required_groups - set(names), set(names) - trainer.allowed_groups
    if missing or extra:
        lacking = f" It lacks {', '.join(sorted(missing))}." if missing else ""
        lacking += f" It does not take {', '.join(sorted(extra))}." if extra else ""
        raise ValueError(f"The stage {stage} needs the groups {', '.join(sorted(trainer.required_groups))}.{lacking}")
    for name in arguments.group_weights:
        if name not in names:
            raise ValueError(unknown_key(name, names, "training.group_weights"))


def check_tokenizer(processor: UnitProcessor, config: UnitConfig) -> None:
    """Whether a tokenizer is the language decoder's.

    Raises:
        ValueError: ids without an embedding, a vocabulary of another size, no end or padding, another placeholder.
    """
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    rows = config.text_config.vocab_size
    ids = set(tokenizer.get_vocab().values()) - {processor.image_token_id}  # the placeholder is never embedded
    if max(ids) >= rows:
        raise ValueError(
            f"The tokenizer does not match the language decoder: it has ids up to {max(ids)}, the embedding has "
            f"{rows} rows."
        )
    if len(ids) < LEAST_FILLED * rows:
        raise ValueError(
            f"The tokenizer does not match the language decoder: it has {len(ids)} pieces, the embedding {rows} rows."
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"The tokenizer has no {name}: texts could not be ended and padded.")
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer does not match the model: {processor.image_token!r} is {processor.image_token_id} there, "
            f"image_token_id is {config.image_token_id}."
        )


def check_positions(groups: list[GroupArguments], processor: UnitProcessor, config: UnitConfig) -> None:
    """Whether the decoder's positions hold the visual tokens and some text. Documents come in many sizes: of those,
    rows that are too long are left out when the data is indexed.

    Raises:
        ValueError: they do not.
    """
    positions = getattr(config.text_config, "max_position_embeddings", None)
    if not positions:
        return
    images = processor.image_processor
    for group in groups:
        if group.kind == "document" and processor.num_queries is None:
            continue
        side = round(images.area(group.scale) ** 0.5)
        visual = processor.num_visual_tokens(*images.grid_for(side, side, "natural", group.scale))
        if visual + TEXT_STEP > positions:
            what = "connector_config.num_queries" if processor.num_queries else "a larger unshuffle, the qformer"
            raise ValueError(
                f"Group {group.name}: {visual} visual tokens and {TEXT_STEP} of text are more than the language "
                f"decoder's {positions} positions (max_position_embeddings): change {what} or the image's size."
            )


# -- data ---------------------------------------------------------------------------------------------------------


def check_sources(groups: list[GroupArguments], reads: bool = True) -> None:
    """Whether each group's sources are there and hold rows of its kind, some of them with text.

    Data sets that are mapped into the schema say their kind themselves, and are looked at when they are opened.

    Args:
        reads: the texts are to be learnt.

    Raises:
        ValueError: a source that is not there, has no row of the group's kind, or a group whose texts are all empty.
    """
    for group in groups:
        texts = []
        for source in group.sources:
            if source.dataset:
                said = source.dataset.get("kind")
                if said and said != group.kind:
                    raise ValueError(f"Group {group.name}: {source.name} is mapped to the kind {said!r}.")
                texts.append(True)
                continue
            texts.append(_has_text(source, group))
        if reads and not any(texts):
            raise ValueError(
                f"Group {group.name}: no {group.kind} row of {', '.join(each.name for each in group.sources)} has any "
                "text: all labels would be masked but the end. Set training.language_weight=0 to train without."
            )


def _has_text(source: SourceArguments, group: GroupArguments) -> bool:
    """Whether a row of the group's kind has text; reads until one is found."""
    import pyarrow
    from pyarrow import parquet

    _, files = find_shards(source.path)
    rows, others, found = 0, set(), False
    for file in files:
        try:
            shard = parquet.ParquetFile(file)
            if not {"kind", "text"} <= set(shard.schema_arrow.names):
                return True  # the reader says which columns lack
            for batch in shard.iter_batches(columns=["kind", "text"]):
                rows += len(batch)
                for kind, text in zip(batch["kind"].to_pylist(), batch["text"].to_pylist(), strict=True):
                    if kind != group.kind:
                        others.add(kind)
                        continue
                    found = True
                    if text:
                        return True
        except (OSError, pyarrow.ArrowException):
            return True  # damaged: the reader counts it among the refusals
    if not rows:
        raise ValueError(f"Group {group.name}: {source.name} has no rows.")
    if not found:
        raise ValueError(
            f"Group {group.name}: {source.name} has no row of the kind {group.kind!r}, only "
            f"{', '.join(map(repr, sorted(map(str, others))))}."
        )
    return False


# -- memory and disk ----------------------------------------------------------------------------------------------


def check_disk(model: torch.nn.Module, arguments: UnitTrainingArguments, adapters: bool) -> None:
    """Whether the checkpoints that a run keeps, and the model at its end, have room.

    Raises:
        ValueError: they have not.
    """
    from .plan import static_memory

    still = static_memory(model, None, arguments)
    trained = still["gradients"]  # as many bytes as the trained weights
    checkpoint = (trained if adapters else still["weights"]) + (0 if arguments.save_only_model else still["optimiser"])
    kept = 0
    if str(arguments.save_strategy) not in ("no", "SaveStrategy.NO"):
        every = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * arguments.max_steps
        count = max(1, math.ceil(arguments.max_steps / max(1, every)))
        kept = min(count, (arguments.save_total_limit or count) + 1)  # a new one is whole before an old one goes
    needed = kept * checkpoint + still["weights"] + (trained if adapters else 0)
    free = shutil.disk_usage(_existing(arguments.output_dir)).free
    if needed > free:
        raise ValueError(
            f"training.output_dir: {kept} checkpoints of {checkpoint / GIB:.2f} GiB and the model take "
            f"{needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free: choose another folder, or a smaller "
            "training.save_total_limit."
        )


def check_memory(model, teacher, arguments, recipe, described, path: Path, overrides: list[str]) -> None:
    """Whether a step fits this machine's free memory; for a CPU, as `plan.check_fits` for a GPU.

    Weights, teacher, gradients and optimiser are known to the byte. Where they and the least that activations can
    take come near what is free, `unit plan` rehearses the step.

    Raises:
        ValueError: the batch does not fit.
    """
    from .plan import Assumed, assumed_batch, planned_apart, refusal, static_memory

    free = psutil.virtual_memory().available
    still = static_memory(model, teacher, arguments)
    needed = sum(still[name] for name in ("weights", "teacher", "optimiser", "gradients"))
    if needed > free:
        raise ValueError(refusal(needed, free) + " Or adapters in place of all weights: lora=both.")
    try:
        batch = assumed_batch(recipe, described, Assumed())
    except ValueError:
        return  # of sizes that the data need not have
    vision, text = described.config.vision_config, described.config.text_config
    width = 2 if arguments.bf16 else 4
    # of a block with checkpointing its input is kept; without, at least the inputs of its four products [ours]
    times = 1 if arguments.gradient_checkpointing else 6
    depth = {"vision": getattr(vision, "num_hidden_layers", 1), "text": getattr(text, "num_hidden_layers", 1)}
    least = sum(group.patches * vision.hidden_size * depth["vision"] * times * width for group in batch)
    least += sum(group.rows * group.text * text.hidden_size * depth["text"] * times * width for group in batch)
    if needed + least < free / 2:
        return
    plan = planned_apart(path, overrides, 1, hardware="cpu")
    if plan is None:
        return
    if plan["needed"] > TOLERANCE * free:
        raise ValueError(refusal(plan["needed"], free))
    if plan["needed"] > free:
        close = f"It will be close: the plan is {plan['needed'] / GIB:.1f} GiB, {free / GIB:.1f} GiB are free."
        print(close, flush=True)


# -- LLaVA --------------------------------------------------------------------------------------------------------


def check_llava(recipe: Recipe) -> None:
    """The stage `llava`: the model is one, its tokenizer is its own, the conversations have something to learn.

    Raises:
        ValueError: in one line what is wrong.
    """
    for key in ("start", "conversations"):
        if getattr(recipe, key) is None:
            raise ValueError(f"The stage llava needs `{key}`.")
    try:
        config = AutoConfig.from_pretrained(recipe.start, trust_remote_code=False)
        kind = config.model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"start {recipe.start}: no model can be found there: {_one_line(error)}") from None
    if kind != "llava":
        raise ValueError(
            f"start {recipe.start} is a {kind!r}, the stage llava trains what `unit llava TOWER LLM OUT` has written."
        )
    processor = LlavaProcessor.from_pretrained(recipe.start)
    top, rows = max(processor.tokenizer.get_vocab().values()), config.text_config.vocab_size
    if top >= rows:
        raise ValueError(
            f"The tokenizer does not match the language model: it has ids up to {top}, the embedding has {rows} rows."
        )
    data = Conversations(recipe.conversations, recipe.images)
    collator = ConversationCollator(processor, getattr(config.text_config, "max_position_embeddings", None))
    places = sorted({round(place * (len(data) - 1) / (LOOKED_AT - 1)) for place in range(LOOKED_AT)})
    if all(bool((collator([data[place]])["labels"] == IGNORED).all()) for place in places):
        raise ValueError(
            f"{recipe.conversations}: all labels are masked in the {len(places)} conversations looked at: the "
            "assistant says nothing."
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
