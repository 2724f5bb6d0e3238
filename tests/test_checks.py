"""Broken recipes: each is refused by `unit train` with one line, before a weight is loaded or a step is made."""

import collections
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import training.checks as checks
from training.checks import check_bf16, check_disk, check_nested, check_types
from training.data.schema import write_shards
from training.data.settings import GroupArguments
from training.llava_toy import make_data, make_language_model
from training.tokenizer import byte_tokenizer
from training.trainer import UnitTrainer
from unit_cli.__main__ import main

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": tiny.PATCH}
SHAPE |= {"image_size": 32}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Models, tokenizers and data sets, whole and broken ones, by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checks")
    model = tiny.unit_model(text=tiny.QWEN3)
    model.save_pretrained(root / "unit")
    tiny.processor().save_pretrained(root / "unit")
    CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SHAPE)).save_pretrained(root / "clip")
    CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SHAPE | {"hidden_size": 48})).save_pretrained(
        root / "wide"
    )
    CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SHAPE | {"patch_size": 12})).save_pretrained(
        root / "coarse"
    )
    config = Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **SHAPE)
    Dinov2WithRegistersModel(config).save_pretrained(root / "registers")
    for name, change in (("many-pieces", {"vocab_size": 200}), ("few-pieces", {"vocab_size": 900})):
        shutil.copytree(root / "unit", root / name)
        settings = json.loads((root / name / "config.json").read_text())
        settings["text_config"] |= change
        (root / name / "config.json").write_text(json.dumps(settings))
    shutil.copytree(root / "unit", root / "endless")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<pad>")
    tokenizer.save_pretrained(root / "endless")
    shutil.copytree(root / "unit", root / "other-placeholder")
    settings = json.loads((root / "other-placeholder" / "config.json").read_text())
    (root / "other-placeholder" / "config.json").write_text(json.dumps(settings | {"image_token_id": 7}))
    write_shards([tiny.document_row(f"line {index}", seed=index) for index in range(4)], root / "documents")
    write_shards([tiny.picture_row(f"thing {index}", seed=index) for index in range(4)], root / "pictures")
    write_shards([tiny.document_row("", seed=index) for index in range(4)], root / "blanks")
    make_language_model(root / "llama", hidden_size=32)
    make_data(root / "toys", colours=("red",), shapes=("circle",))
    (root / "file").write_text("no folder")
    return root


def whole(root) -> dict:
    """A recipe that runs."""
    groups = [
        {"kind": kind, "scale": scale, "rows": 2, "sources": [{"path": str(root / folder)}]}
        for kind, scale, folder in (("document", 4, "documents"), ("natural", 1, "pictures"))
    ]
    training = {"max_steps": 2, "learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    unit = str(root / "unit")
    return {"stage": "intra_scale", "start": unit, "teacher": unit, "groups": groups, "training": training}


def new_model(root, **changes) -> dict:
    """Of a recipe that makes a model around CLIP."""
    text = {
        key: value for key, value in tiny.QWEN3.items() if key not in ("vocab_size", "pad_token_id", "eos_token_id")
    }
    model = {
        "connector_config": {"connector_type": "mlp", "unshuffle": 1},
        "text_config": text | {"bos_token_id": None},
    }
    for key, value in changes.items():
        model[key] = model.get(key, {}) | value if isinstance(value, dict) else value
    images = {"patch_size": tiny.PATCH, "base_size": 32, "scale_as": "area", "max_side": 128}
    return {"start": str(root / "clip"), "teacher": None, "model": model, "image_processor": images}


def training(**changes):
    return lambda root: {"training": whole(root)["training"] | changes}


def around(**changes):
    return lambda root: new_model(root, **changes)


def source(place: int, *names: str, **group):
    """Other sources, or other settings, of one group."""

    def change(root):
        groups = whole(root)["groups"]
        groups[place] |= {"sources": [{"path": str(root / name)} for name in names]} if names else {}
        return {"groups": [*groups[:place], groups[place] | group, *groups[place + 1 :]]}

    return change


def named(**keys: str):
    return lambda root: {key: str(root / name) for key, name in keys.items()}


def llava(**changes):
    def change(root):
        keys = {
            "stage": "llava",
            "teacher": None,
            "groups": None,
            "conversations": str(root / "toys/conversations.json"),
        }
        return keys | {key: value(root) if callable(value) else value for key, value in changes.items()}

    return change


BROKEN = {
    # keys
    "a key of the recipe": (lambda root: {"strat": "x"}, "Unknown key 'strat' in the recipe. Did you mean 'start'?"),
    "a key of training": (training(max_step=3), "Unknown key 'max_step' in `training`. Did you mean 'max_steps'?"),
    "parts as a word": (training(freeze="encoder"), "`training`.freeze must be a list, as [encoder], got 'encoder'."),
    "a schedule": (training(lr_scheduler_type="cosin"), "training: cosin is not a valid SchedulerType"),
    "a key of lora": (lambda root: {"lora": {"aplha": 3}}, "Unknown key 'aplha' in `lora`. Did you mean 'alpha'?"),
    "a key of the curriculum": (
        lambda root: {"data": {"curriculum": {"level": 3}}},
        "Unknown key 'level' in `data.curriculum`. Did you mean 'levels'?",
    ),
    "a key of the model": (
        around(connector={"unshuffle": 2}),
        "Unknown key 'connector' in `model`. Did you mean 'connector_config'?",
    ),
    "a key of the connector": (
        around(connector_config={"unshufle": 2}),
        "Unknown key 'unshufle' in `model.connector_config`. Did you mean 'unshuffle'?",
    ),
    "a key of the decoder": (
        around(text_config={"hiden_size": 2}),
        "Unknown key 'hiden_size' in `model.text_config`. Did you mean 'hidden_size'?",
    ),
    "a decoder that is none": (
        around(text_config={"model_type": "qwen33"}),
        "`model.text_config` has the model_type 'qwen33', which transformers lacks. Did you mean 'qwen3'?",
    ),
    "a key of the image processor": (
        lambda root: {"image_processor": {"base_sise": 32}},
        "Unknown key 'base_sise' in `image_processor`. Did you mean 'base_size'?",
    ),
    "a key of the start": (
        lambda root: {"start_settings": {"hidden_activation": "gelu"}},
        "Unknown key 'hidden_activation' in `start_settings`. Did you mean 'hidden_act'?",
    ),
    "a word for a number": (training(max_steps="many"), "`training`.max_steps must be a whole number, got 'many'"),
    # settings
    "no steps": (training(max_steps=0), "A recipe needs training.max_steps"),
    "no rate": (training(learning_rate=0), "training.learning_rate must be above 0, got 0"),
    "a long warm-up": (training(warmup_steps=9), "training.warmup_steps (9) is more than training.max_steps (2)"),
    "a batch of batches": (
        training(per_device_train_batch_size=4),
        "training.per_device_train_batch_size must be 1: an item of the mixture is a whole micro-batch",
    ),
    "nothing to learn": (training(language_weight=0, vision_weight=0), "every weight of the loss is 0"),
    "alignment without a reader": (
        training(language_weight=0, vision_weight=0, alignment_weight=1),
        "training.alignment_weight teaches the language decoder: it needs a language_weight above 0",
    ),
    "alignment without places": (
        lambda root: new_model(root, connector_config={"unshuffle": 2}) | training(alignment_weight=1)(root),
        "training.alignment_weight needs one visual token a patch (connector_type: mlp, unshuffle: 1)",
    ),
    "everything frozen": (
        training(freeze=["encoder", "connector", "language_decoder", "vision_decoder"]),
        "Nothing trains: all parts are under training.freeze",
    ),
    "an unknown part": (training(freeze=["decoder"]), "Unknown parts to freeze: ['decoder']"),
    "a rate of no part": (training(part_rates={"tower": 2}), "Unknown parts in part_rates: ['tower']"),
    "a weight of no group": (
        training(group_weights={"documents_x4": 2}),
        "Unknown key 'documents_x4' in training.group_weights. Did you mean 'document_x4'?",
    ),
    "an adapter for nothing": (
        lambda root: {"lora": {"parts": ["decoder"]}},
        "LoRA takes the parts encoder, language_decoder; unknown: ['decoder']",
    ),
    # sizes
    "heads of the decoder": (
        lambda root: new_model(root) | {"model": {"text_config": {"hidden_size": 32, "num_attention_heads": 3}}},
        "text_config.hidden_size (32) must be a multiple of its num_attention_heads (3)",
    ),
    "groups of heads": (
        around(text_config={"num_attention_heads": 3}),
        "text_config.num_attention_heads (3) must be a multiple of num_key_value_heads (2)",
    ),
    "heads of the Q-Former": (
        around(connector_config={"connector_type": "qformer", "num_attention_heads": 5}),
        "the Q-Former's width (32) must be a multiple of its num_attention_heads (5)",
    ),
    "more queries than positions": (
        around(connector_config={"connector_type": "qformer", "num_attention_heads": 2, "num_queries": 250}),
        "Group document_x4: 250 visual tokens and 32 of text are more than the language decoder's 256 positions",
    ),
    "a number that is text": (
        around(connector_config={"unshuffle": "2"}),
        "unshuffle must be a positive whole number",
    ),
    "another patch": (
        lambda root: new_model(root) | {"image_processor": {"patch_size": 16}},
        "image_processor.patch_size is 16, the encoder's patches are 8",
    ),
    "no rows": (source(0, rows=0), "Group document_x4: give either rows or patches, above 0; got rows 0, patches 0"),
    "rows and patches": (source(0, patches=9), "give either rows or patches, above 0; got rows 2, patches 9"),
    # kinds
    "one kind missing": (
        lambda root: {"groups": whole(root)["groups"][:1]},
        "The stage intra_scale needs the groups document_x4, natural_x1. It lacks natural_x1.",
    ),
    "pictures for documents": (source(0, "pictures"), "pictures has no row of the kind 'document', only 'natural'"),
    "documents for pictures": (source(1, "documents"), "documents has no row of the kind 'natural', only 'document'"),
    "a group without sources": (source(0, sources=[]), "Group document_x4: needs at least one source"),
    "an unknown kind": (source(0, kind="page"), "A group's kind must be natural or document, got 'page'"),
    "an unknown scale": (source(0, scale=2), "A group's scale must be 1 or 4, got 2"),
    "data that is not there": (source(0, "nowhere"), "No parquet shards in"),
    "texts all empty": (source(0, "blanks"), "Group document_x4: no document row of"),
    # tokenizer and teacher
    "ids without an embedding": (
        named(start="many-pieces"),
        "The tokenizer does not match the language decoder: it has ids up to 261, the embedding has 200 rows",
    ),
    "an embedding without ids": (
        named(start="few-pieces"),
        "The tokenizer does not match the language decoder: it has 261 pieces, the embedding 900 rows",
    ),
    "another placeholder": (named(start="other-placeholder"), "'<image>' is 2 there, image_token_id is 7"),
    "no end of text": (named(start="endless"), "The tokenizer has no eos_token_id"),
    "a teacher of another width": (named(teacher="wide"), "The teacher's width is 48, the vision decoder gives 32"),
    "a teacher with registers": (
        named(teacher="registers"),
        "The teacher puts 5 class and register tokens in front of its patch tokens, the encoder 1",
    ),
    "a teacher of other patches": (
        named(teacher="coarse"),
        "A picture at x1 is 32 x 32 pixels, which the teacher's patches of 12 do not divide",
    ),
    # where from and where to
    "stage 2 from an encoder": (
        lambda root: {"stage": "inter_scale", "start": str(root / "clip")},
        "clip is no UNIT model with a connector and a language decoder, which stage 2 goes on with",
    ),
    "a start that is not there": (named(start="nowhere"), "start: there is no "),
    "a teacher that is not there": (named(teacher="nowhere"), "teacher: there is no "),
    "a folder that is a file": (
        lambda root: {"training": whole(root)["training"] | {"output_dir": str(root / "file" / "out")}},
        "cannot be written to",
    ),
    # LLaVA
    "a LLaVA that is none": (
        llava(),
        "is a 'unit', the stage llava trains what `unit llava TOWER LLM OUT` has written",
    ),
    "a folder as a language decoder": (
        lambda root: {"start": str(root / "clip"), "teacher": None, "language_decoder": str(root / "documents")},
        "documents: no language model there (no config.json with a model_type)",
    ),
    "adapters in bfloat16 alone": (
        lambda root: {"lora": {"preset": "both", "base_dtype": "bfloat16"}},
        "lora.base_dtype: bfloat16 needs training.bf16: true",
    ),
    "an unknown preset": (lambda root: {"lora": "encoderr"}, "lora.preset must be one of encoder, decoder, both"),
    "a LLaVA without data": (llava(conversations=None), "The stage llava needs `conversations`."),
}


@pytest.fixture
def nothing_starts(monkeypatch):
    """Loading weights and making a step are failures that no command words."""

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    def stepped(*_, **__):
        raise AssertionError("a step was made")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(UnitTrainer, "training_step", stepped)


def run(root, folder, changes, capsys) -> SimpleNamespace:
    recipe = whole(root) | {"training": whole(root)["training"]} | changes
    if "output_dir" not in recipe["training"]:
        recipe["training"]["output_dir"] = str(folder / "out")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status = main(["train", str(folder / "recipe.yaml")])
    said = capsys.readouterr()
    return SimpleNamespace(status=status, out=said.out, lines=[line for line in said.err.splitlines() if line.strip()])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_refused_before_anything_starts(name, parts, tmp_path, nothing_starts, capsys):
    change, words = BROKEN[name]
    done = run(parts, tmp_path, change(parts), capsys)
    assert done.status == 2
    (line,) = [line for line in done.lines if line.startswith("unit train: ")]
    assert words in line
    assert not any(line.startswith("Traceback") for line in done.lines)
    assert done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (parts / "file").read_text() == "no folder"


def test_the_recipes_that_the_broken_ones_come_from_run(parts, tmp_path, capsys):
    """Else any of them could be refused for another reason."""
    for name, changes in (("whole", {}), ("around", new_model(parts))):
        (tmp_path / name).mkdir()
        done = run(parts, tmp_path / name, changes, capsys)
        assert done.status == 0, done.lines
        assert (tmp_path / name / "out" / "model.safetensors").is_file()


def test_the_recipe_that_writes_the_start_is_named(parts, tmp_path, nothing_starts, capsys):
    first = whole(parts) | {"training": {"max_steps": 2, "output_dir": str(tmp_path / "runs" / "stage1")}}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    done = run(parts, tmp_path, {"start": str(tmp_path / "runs" / "stage1")}, capsys)
    assert done.lines[-1].endswith(f"Run {tmp_path / 'first.yaml'} first, which writes it.")


def test_a_blank_source_beside_others_is_taken(parts, tmp_path, capsys):
    done = run(parts, tmp_path, source(0, "blanks", "documents")(parts), capsys)
    assert done.status == 0, done.lines


def test_a_llava_that_has_nothing_to_learn_or_see(parts, tmp_path, capsys, monkeypatch):
    """Answers that are all masked, a picture that is not there; before the model is loaded."""
    assembled = tmp_path / "llava"
    assert main(["llava", str(parts / "unit"), str(parts / "llama"), str(assembled), "--size", "32"]) == 0
    asked = {"from": "human", "value": "<image>\nWhat?"}
    silent = [{"image": "red-circle.png", "conversations": [asked, {"from": "gpt", "value": "red"}]}]
    lost = [{"image": "gone.png", "conversations": [asked, {"from": "gpt", "value": "red"}]}]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    masked = checks.ConversationCollator.row
    for entries, words in ((silent, "all labels are masked in the 1 conversations"), (lost, "there is no image")):
        file = parts / "toys" / "broken.json"
        file.write_text(json.dumps(entries))
        if entries is silent:  # as a template would that puts nothing behind the question

            def unlabelled(self, messages, tokens):
                ids, labels = masked(self, messages, tokens)
                return ids, [checks.IGNORED] * len(labels)

            monkeypatch.setattr(checks.ConversationCollator, "row", unlabelled)
        done = run(parts, tmp_path, llava(start=str(assembled), conversations=str(file))(parts), capsys)
        assert done.status == 2
        assert words in done.lines[-1]
    assert not (tmp_path / "out").exists()


# -- what the machine lacks ------------------------------------------------------------------------


def test_a_disk_that_is_too_small(parts, tmp_path, nothing_starts, monkeypatch, capsys):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    saving = training(save_strategy="steps", save_steps=1, max_steps=9)
    done = run(parts, tmp_path, saving(parts), capsys)
    assert done.status == 2
    # the limit of two and the one that is being written
    assert "training.output_dir: 3 checkpoints of 0.00 GiB and the model take" in done.lines[-1]
    assert not (tmp_path / "out").exists()


class Counted(torch.nn.Module):
    """1,000 weights of an encoder, and 10 of an adapter."""

    def __init__(self):
        super().__init__()
        self.vision_model = torch.nn.ParameterDict({"frozen": torch.zeros(1000), "lora_A": torch.zeros(10)})


@pytest.mark.parametrize(
    ("settings", "adapters", "needed"),
    [
        # weights and two moments: 3 x 4 x 1010, twice and one in the making, and the model: 4 x 1010
        ({"save_strategy": "steps", "save_steps": 1, "max_steps": 9}, False, 3 * 12120 + 4040),
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": 5}, False, 12120 + 4040),
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": 5, "save_only_model": True}, False, 4040 + 4040),
        ({"save_strategy": "no", "max_steps": 5}, False, 4040),
        # adapters and their moments: 3 x 4 x 10; the model, and the adapter beside it
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": 5}, True, 120 + 4040 + 40),
    ],
)
def test_the_disk_that_a_run_takes(settings, adapters, needed, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    model = Counted()
    model.vision_model["frozen"].requires_grad_(not adapters)
    base = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "save_total_limit": 2, "report_to": "none"}
    arguments = checks.UnitTrainingArguments(**base | settings)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(10**6, 0, needed))
    check_disk(model, arguments, adapters)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(10**6, 0, needed - 1))
    with pytest.raises(ValueError, match=r"training\.output_dir: "):
        check_disk(model, arguments, adapters)


def test_a_model_that_does_not_fit_the_memory(parts, tmp_path, nothing_starts, monkeypatch, capsys):
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    done = run(parts, tmp_path, {}, capsys)
    assert done.status == 2
    assert "The batch does not fit: the plan is 0.0 GiB" in done.lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_fit_the_memory(parts, tmp_path, nothing_starts, monkeypatch, capsys):
    """The plan is asked where it comes near, and what it says decides."""
    gibibytes = 2**30
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=gibibytes))
    asked = []

    def planned(path, overrides, world, hardware):
        asked.append((world, hardware))
        return {"needed": 1.2 * gibibytes}

    monkeypatch.setattr("training.plan.planned_apart", planned)
    large = source(0, rows=4096)(parts)
    done = run(parts, tmp_path, large, capsys)
    assert done.status == 2
    assert "The batch does not fit: the plan is 1.2 GiB, there are 1.0 GiB." in done.lines[-1]
    assert asked == [(1, "cpu")]


def test_bfloat16_is_refused_where_the_gpu_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match=r"training\.bf16: Tesla T4 does not compute in bfloat16"):
        check_bf16({"bf16": True})
    check_bf16({"bf16": False})
    check_bf16({"bf16": True, "use_cpu": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_bf16({"bf16": True})


# -- keys and types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": 2.0}, "rows must be a whole number, got 2.0"),
        ({"rows": True}, "rows must be a whole number, got True"),
        ({"packed": 1}, "packed must be true or false, got 1"),
        ({"kind": 4}, "kind must be text, got 4"),
        ({"tasks": 3}, "tasks must be numbers by name"),
        ({"tasks": {"ocr": "all"}}, "tasks must be numbers by name"),
    ],
)
def test_values_of_another_type_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        check_types(given, GroupArguments, "a group")
    check_types({"rows": 2, "packed": False, "kind": "natural", "scale": None}, GroupArguments, "a group")


def test_what_the_architectures_know_is_known():
    """`n_embd` of a GPT-2 is its own name for a width; both may be written."""
    check_nested({"model": {"text_config": {"model_type": "gpt2", "n_embd": 32, "hidden_size": 32, "n_layer": 1}}})
    check_nested({"model": {"vision_config": {"hidden_size": 32}, "character_slots": 2}})
    with pytest.raises(ValueError, match="`model` must be a mapping, got 3"):
        check_nested({"model": 3})
