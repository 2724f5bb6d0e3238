"""`unit llava`: a LLaVA checkpoint from its parts, what it learns from, and the whole way at toy size."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import image_processor, noise, picture_row, processor, unit_model, vision_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    OPTForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_unit import UnitVisionModel
from training import llava_assembly, llava_toy
from training.arguments import LoraArguments
from training.data.schema import write_shards
from training.export import save_encoder, save_full
from training.llava_assembly import CHAT_TEMPLATE, FLATTEN, assemble, build_llava, load_tower, selection_for
from training.llava_data import ConversationCollator, Conversations, read_conversations
from training.lora import add_lora
from training.recipe import read_recipe
from training.tokenizer import byte_tokenizer
from training.trainer import freeze_parts, trainable_table
from unit_cli.__main__ import main

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SHAPE |= {"patch_size": 8, "image_size": 32}


def llama(**changes) -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": 262, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**(shape | {"max_position_embeddings": 256} | changes)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of towers and of a language model, whose tokenizer knows no `<image>` yet."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    ours = unit_model(vision=vision_config(num_cls_tokens=3, image_size=64, cpe_max_size=64))
    save_encoder(ours, image_processor(image_mean=[0.4, 0.5, 0.6]), root / "unit")
    save_full(ours, processor(image_mean=[0.4, 0.5, 0.6]), root / "unit-full")
    save_full(unit_model(vision=SHAPE | {"model_type": "clip_vision_model"}), processor(), root / "unit-of-clip")
    CLIPVisionModel(CLIPVisionConfig(**SHAPE)).save_pretrained(root / "clip")
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    CLIPModel(CLIPConfig(vision_config=SHAPE, text_config=text)).save_pretrained(root / "clip-full")
    SiglipVisionModel(SiglipVisionConfig(**SHAPE)).save_pretrained(root / "siglip")
    Siglip2VisionModel(
        Siglip2VisionConfig(**{key: SHAPE[key] for key in SHAPE if key != "image_size"})
    ).save_pretrained(root / "siglip2")
    registers = {key: SHAPE[key] for key in SHAPE if key != "intermediate_size"} | {"num_register_tokens": 4}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**registers)).save_pretrained(root / "registers")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "llama")
    written = root / "llama" / "tokenizer.json"
    written.write_text(written.read_text().replace('"<image>"', '"<other>"'))
    settings = root / "llama" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"<image>"', '"<other>"'))
    llama().save_pretrained(root / "llama")
    return root


def logits_of(folder, image, question="USER: <image>\nWhat? ASSISTANT: "):
    model, made = LlavaForConditionalGeneration.from_pretrained(folder).eval(), LlavaProcessor.from_pretrained(folder)
    inputs = made(images=image, text=question, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits, inputs, model


# -- assembling ------------------------------------------------------------------------------------

TOWERS = [
    ("unit", "default", -1, 64),  # x1 is 32 pixels: twice that, in patches of 8
    ("unit-full", "default", -1, 64),
    ("unit-of-clip", "default", -2, 16),
    ("clip", "default", -2, 16),
    ("clip-full", "default", -2, 16),
    ("siglip", "full", -2, 16),
]


@pytest.mark.parametrize(("name", "select", "layer", "tokens"), TOWERS)
def test_any_tower_becomes_a_llava_that_answers(parts, tmp_path, name, select, layer, tokens):
    found = assemble(str(parts / name), str(parts / "llama"), tmp_path / "out")
    assert (found["select"], found["layer"], found["image_tokens"]) == (select, layer, tokens)
    assert found["new_tokens"] >= 1
    logits, inputs, model = logits_of(tmp_path / "out", noise(40, 20))
    image_id = model.config.image_token_id
    assert (inputs["input_ids"] == image_id).sum() == tokens
    assert logits.isfinite().all()
    other = logits_of(tmp_path / "out", noise(40, 20, seed=1))[0]
    assert (logits[0, -1] - other[0, -1]).abs().max() > 0  # it looks at the picture
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_the_processor_is_right(parts, tmp_path):
    assemble(str(parts / "unit"), str(parts / "llama"), tmp_path / "out")
    made = LlavaProcessor.from_pretrained(tmp_path / "out")
    assert made.patch_size == 8
    assert made.num_additional_image_tokens == 1
    assert made.vision_feature_select_strategy == "default"
    assert made.image_token == "<image>"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made.image_token_id == config["image_token_index"] == 262  # a new one behind the 262 of the tokenizer
    assert config["image_seq_length"] == 64
    assert made.image_processor.crop_size["height"] == 64
    assert list(made.image_processor.image_mean) == [0.4, 0.5, 0.6]


def test_the_parts_are_as_they_were_and_the_vocabulary_has_grown(parts, tmp_path):
    assemble(str(parts / "unit"), str(parts / "llama"), tmp_path / "out", size=32)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    text = AutoModelForCausalLM.from_pretrained(parts / "llama")
    for name, value in text.model.state_dict().items():
        kept = model.model.language_model.state_dict()[name]
        assert torch.equal(kept[: len(value)], value), name
    assert torch.equal(model.lm_head.weight[:262], text.lm_head.weight)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 263
    encoder = UnitVisionModel.from_pretrained(parts / "unit").eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        given = model.eval().model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        # layer -1 of UNIT's own carries the trained final norm
        torch.testing.assert_close(given, encoder(pixels).last_hidden_state, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, -2, [-2, -1]])
def test_layers_and_selection_can_be_chosen(parts, tmp_path, layer):
    found = assemble(str(parts / "clip"), str(parts / "llama"), tmp_path / "out", select="full", layer=layer)
    assert (found["image_tokens"], found["layer"]) == (17, layer or [0])  # CLIP in transformers knows no bare 0


def test_tied_embeddings_stay_tied(tmp_path, parts):
    text = llama(tie_word_embeddings=True)
    text.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    assemble(str(parts / "clip"), str(tmp_path / "llama"), tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_another_language_model_than_llama(parts, tmp_path):
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "vocab_size": 262, "max_position_embeddings": 256, "pad_token_id": 0}
    OPTForCausalLM(OPTConfig(**shape, eos_token_id=1, bos_token_id=None)).save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    assert assemble(str(parts / "unit"), str(tmp_path / "opt"), tmp_path / "out", size=32)["image_tokens"] == 16


def test_a_template_of_the_language_model_is_kept(parts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(parts / "llama")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}|{{ message['content'] }}]{% endfor %}"
    )
    llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    found = assemble(str(parts / "clip"), str(tmp_path / "llama"), tmp_path / "out")
    assert found["prompt"] == "[user|<image>\nWhat is this?]"


def test_the_default_template_is_vicunas():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FLATTEN + CHAT_TEMPLATE
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": "Sure?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat? ASSISTANT: A dog.<eos>USER: Sure? ASSISTANT: "


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "select", "given"), [(1, None, "default"), (0, None, "full"), (1, "full", "full"), (5, "full", "full")]
)
def test_the_selection_that_fits(prefix, select, given):
    assert selection_for(prefix, select) == given


@pytest.mark.parametrize(("prefix", "select"), [(5, None), (5, "default"), (0, "default")])
def test_more_prefix_tokens_than_the_selection_drops_are_refused(prefix, select):
    with pytest.raises(ValueError, match=f"has {prefix} class and register tokens .* drops exactly one") as error:
        selection_for(prefix, select)
    assert "\n" not in str(error.value)


WRONG = [
    (["registers", "llama"], {}, 'has 5 class and register tokens .* selection "full"'),
    (["siglip", "llama"], {"select": "default"}, "has 0 class and register tokens"),
    (["siglip2", "llama"], {}, "'siglip2_vision_model', which cannot be LLaVA's tower. These can: clip_vision_model"),
    (["llama", "llama"], {}, "is a 'llama', which cannot be LLaVA's tower"),
    (["nowhere", "llama"], {}, "no vision model there"),
    (["clip", "nowhere"], {}, "no causal language model there"),
    (["clip", "clip"], {}, "no causal language model there"),
    (["clip", "llama"], {"size": 64}, "takes images of 32 pixels a side; only UNIT's own"),
    (["unit", "llama"], {"size": 60}, "multiple of the patch size 8, got 60"),
    (["clip", "llama"], {"layer": 3}, "numbered -3 to 2; there is no 3"),
    (["clip", "llama"], {"layer": [-2, -4]}, "numbered -3 to 2; there is no -4"),
]


@pytest.mark.parametrize(("names", "settings", "words"), WRONG, ids=str)
def test_parts_that_do_not_fit_are_refused_and_leave_nothing(parts, tmp_path, names, settings, words):
    tower, text = (str(parts / name) for name in names)
    with pytest.raises(ValueError, match=words) as error:
        assemble(tower, text, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_registers_can_be_kept_as_tokens(parts, tmp_path):
    found = assemble(str(parts / "registers"), str(parts / "llama"), tmp_path / "out", select="full")
    assert found["image_tokens"] == 5 + 16


def test_a_wrong_count_of_image_tokens_is_found_before_it_says_done(parts, tmp_path, monkeypatch):
    tower = load_tower(str(parts / "clip"))
    tower.prefix = 0  # a lie: CLIP has a class token
    monkeypatch.setattr(llava_assembly, "load_tower", lambda *_: tower)
    with pytest.raises(ValueError, match="The processor makes 16 image tokens of a picture, the tower 17"):
        assemble("clip", str(parts / "llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_llava_cannot_hold_is_refused(parts):
    tower = load_tower(str(parts / "clip"))
    text = llama()
    text.lm_head = torch.nn.Linear(32, 262, bias=True)
    with pytest.raises(ValueError, match="has a bias in its head"):
        build_llava(tower, text, 2, "default", -2)


def test_a_language_model_that_gives_something_else_inside_is_found(parts, tmp_path, monkeypatch):
    whole = build_llava

    def scaled(*arguments):
        model = whole(*arguments)
        model.lm_head.weight.data *= 2.0  # as a head that scales its logits would look
        return model

    monkeypatch.setattr(llava_assembly, "build_llava", scaled)
    with pytest.raises(ValueError, match="does not give inside LLaVA what it gives alone"):
        assemble(str(parts / "clip"), str(parts / "llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- the command -----------------------------------------------------------------------------------


def test_the_command_assembles(parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["llava", str(parts / "unit"), str(parts / "llama"), str(out), "--size", "32", "--layer=-2,-1"]) == 0
    printed = capsys.readouterr().out
    assert "32 x 32 pixels and 16 tokens" in printed
    assert "layer [-2, -1]" in printed
    assert (out / "model.safetensors").is_file()
    assert main(["llava", str(parts / "unit"), str(parts / "llama"), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "made"), [("unit", "UnitVisionModel"), ("vit", "ViTModel"), ("clip", "CLIPVisionModel")]
)
def test_the_command_writes_towers(parts, tmp_path, capsys, name, made):
    # more prefix tokens than others have: only ours
    assert (
        main(["llava", str(parts / "unit-full"), str(tmp_path / "out"), "--tower-only", name]) == (name != "unit") * 2
    )
    captured = capsys.readouterr()
    if name == "unit":
        assert f"{made} for 64 pixels a side" in captured.out
    else:
        assert "3 class and register tokens" in captured.err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unit", "OUT"], "TOWER, LLM and OUT are needed"),
        (["unit", "llama", "OUT", "--tower-only", "vit"], "no language model"),
        (["unit", "OUT", "--tower-only", "vit", "--layer", "-1"], "belong to LLaVA's model"),
        (["registers", "llama", "OUT"], "has 5 class and register tokens"),
        ([".", "llama", "OUT"], "no model there"),
    ],
    ids=str,
)
def test_the_command_refuses_with_one_line(parts, tmp_path, capsys, arguments, words):
    names = {"unit", "llama", "registers", "."}
    given = [str(parts / one) if one in names else str(tmp_path / "out") if one == "OUT" else one for one in arguments]
    assert main(["llava", *given]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- data ------------------------------------------------------------------------------------------


def conversation(*turns: str, image="a.png") -> dict:
    speakers = ("human", "gpt")
    entry = {"conversations": [{"from": speakers[index % 2], "value": turn} for index, turn in enumerate(turns)]}
    return entry if image is None else entry | {"image": image}


def write_json(folder: Path, entries, name="data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(entries) if name.endswith(".json") else "\n".join(json.dumps(one) for one in entries))
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_conversations_are_read_in_llavas_format(tmp_path, name):
    noise(30, 20).save(tmp_path / "a.png")
    noise(8, 8).convert("RGBA").save(tmp_path / "b.png")
    entries = [
        conversation("<image>\nWhat?", "A dog."),
        conversation("No place yet.", "Then in front.", "And?", "Nothing."),
        conversation("Both <image> <image>?", "Yes.", image=["a.png", "b.png"]),
        conversation("Text alone.", "Yes.", image=None),
    ]
    data = Conversations(write_json(tmp_path, entries, name), tmp_path)
    assert len(data) == 4
    assert [len(data[index]["images"]) for index in range(4)] == [1, 1, 2, 0]
    assert data[0]["images"][0].size == (30, 20)
    assert data[2]["images"][1].mode == "RGB"
    assert data[1]["messages"][0] == {"role": "user", "content": "<image>\nNo place yet."}
    assert [message["role"] for message in data[1]["messages"]] == ["user", "assistant"] * 2


def test_rows_of_our_schema_become_questions(tmp_path):
    write_shards([picture_row("A cat."), picture_row("A boat.", seed=1)], tmp_path / "rows")
    data = Conversations(tmp_path / "rows")
    assert len(data) == 2
    item = data[1]
    assert item["messages"] == [
        {"role": "user", "content": "<image>\nDescribe the picture in one sentence."},
        {"role": "assistant", "content": "A boat."},
    ]
    assert item["images"][0].size == (20, 20)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "must hold a list"),
        ({"a": 1}, "must hold a list"),
        ([{"image": "a.png"}], "entry 0: `conversations` must be a list"),
        ([conversation("What?")], "entry 0: no turn of the assistant"),
        ([{"conversations": [{"from": "bird", "value": "tweet"}]}], "entry 0: a turn needs `from`"),
        ([conversation("<image><image>", "x")], "entry 0: 1 images, but <image> stands 2 times"),
        ([conversation("<image>", "x", image=None)], "entry 0: 0 images"),
        ([conversation("?", "x", image=["a.png", "a.png"])], "entry 0: 2 images, but <image> stands 0 times"),
        ([conversation("?", "x", image="missing.png")], "entry 0: there is no image .*missing.png"),
    ],
    ids=str,
)
def test_wrong_conversations_are_refused(tmp_path, entries, words):
    noise(8, 8).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=words):
        Conversations(write_json(tmp_path, entries))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_conversations(tmp_path / "data.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(tmp_path / "other.json")


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "llava"
    assemble(str(parts / "unit"), str(parts / "llama"), folder, size=16)  # 2 x 2 patches: 4 tokens a picture
    return folder


def test_labels_are_the_assistants_words(assembled):
    made = LlavaProcessor.from_pretrained(assembled)
    collate = ConversationCollator(made)
    two = [
        {"role": "user", "content": "<image>\nHow many?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    one = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    batch = collate([{"messages": two, "images": [noise(20, 20)]}, {"messages": one, "images": []}])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape
    tokenizer = made.tokenizer
    whole = "USER: <image><image><image><image>\nHow many? ASSISTANT: Two.<eos>USER: Sure? ASSISTANT: Yes.<eos>"
    assert tokenizer.decode(ids[0]) == whole
    assert tokenizer.decode(ids[0][labels[0] != -100]) == "Two.<eos>Yes.<eos>"
    assert tokenizer.decode(ids[1][labels[1] != -100]) == "Ho<eos>"
    assert (labels[labels != -100] == ids[labels != -100]).all()
    assert mask[1].sum() == len("USER: Hi ASSISTANT: Ho") + 1
    assert (ids[1][mask[1] == 0] == tokenizer.pad_token_id).all()


def test_labels_stay_in_place_between_pictures(assembled):
    made = LlavaProcessor.from_pretrained(assembled)
    messages = [
        {"role": "user", "content": "<image>One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "<image>Two?"},
        {"role": "assistant", "content": "2"},
    ]
    batch = ConversationCollator(made)([{"messages": messages, "images": [noise(9, 9), noise(20, 9)]}])
    assert (batch["input_ids"] == made.image_token_id).sum() == 8
    assert made.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "1<eos>2<eos>"


def test_what_the_collator_asks_is_what_the_processor_asks(assembled):
    made = LlavaProcessor.from_pretrained(assembled)
    question, picture = {"role": "user", "content": "<image>\nWhat?"}, noise(30, 20)
    answered = [question, {"role": "assistant", "content": "x"}]
    row = ConversationCollator(made)([{"messages": answered, "images": [picture]}])
    prompt = made.apply_chat_template([question], add_generation_prompt=True)
    asked = made(images=picture, text=prompt, return_tensors="pt")
    length = asked["input_ids"].shape[1]
    assert torch.equal(row["input_ids"][:, :length], asked["input_ids"])
    assert (row["labels"][:, :length] == -100).all()
    assert torch.equal(row["pixel_values"], asked["pixel_values"])


def test_conversations_that_cannot_be_labelled_are_refused(assembled):
    made = LlavaProcessor.from_pretrained(assembled)
    one = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "images": []}
    with pytest.raises(ValueError, match="is 23 tokens long, the language model takes 20"):
        ConversationCollator(made, 20)([one])
    with pytest.raises(ValueError, match="1 images for 0 places"):
        ConversationCollator(made)([one | {"images": [noise(9, 9)]}])
    made.chat_template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="writes a turn differently once it is answered"):
        ConversationCollator(made)([one])


# -- training --------------------------------------------------------------------------------------


def test_parts_of_llava_are_frozen_by_the_names_of_the_recipes(assembled):
    model = LlavaForConditionalGeneration.from_pretrained(assembled)
    freeze_parts(model, ["encoder", "language_decoder"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert [line.split()[0] for line in trainable_table(model).splitlines()] == [
        "part",
        "encoder",
        "connector",
        "language_decoder",
        "all",
    ]


@pytest.mark.parametrize(("parts_", "ends"), [(["language_decoder"], "language_model"), (["encoder"], "vision_tower")])
def test_adapters_go_where_they_are_asked_for(assembled, parts_, ends):
    model = LlavaForConditionalGeneration.from_pretrained(assembled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = add_lora(model, LoraArguments(parts=parts_, r=2, dropout=0.0))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert adapters
    assert all(f".model.{ends}." in name for name in adapters)
    assert all("multi_modal_projector" in name for name in trained - adapters)
    merged = wrapped.merge_and_unload()
    for name, value in merged.state_dict().items():  # untrained adapters add nothing
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["1-projector", "2-all"])
def test_the_recipes_are_read(name):
    recipe = read_recipe(llava_toy.RECIPES / f"{name}.yaml")
    assert recipe.stage == "llava"


def test_the_stage_needs_a_model_and_data(tmp_path, capsys):
    recipe = str(llava_toy.RECIPES / "1-projector.yaml")
    assert main(["train", recipe, f"training.output_dir={tmp_path}", "training.bf16=false"]) == 2
    assert "The stage llava needs `start`" in capsys.readouterr().err


def test_adapters_learn_through_checkpointed_layers_and_are_merged(assembled, tmp_path):
    """The recipe with LoRA on both parts, as for a small device: what is saved is a plain LLaVA again."""
    file = llava_toy.make_data(tmp_path / "data", ("red",), ("circle", "cross"))
    overrides = [f"start={assembled}", f"conversations={file}", f"training.output_dir={tmp_path / 'out'}"]
    overrides += ["training.max_steps=2", "training.per_device_train_batch_size=2", "training.warmup_steps=0"]
    overrides += [
        "training.gradient_accumulation_steps=1",
        "training.save_strategy='no'",
        "training.learning_rate=0.1",
    ]
    overrides += ["lora.parts=[encoder, language_decoder]", "training.gradient_checkpointing=true"]
    out = llava_toy.recipe.main(llava_toy.RECIPES / "2-all.yaml", [*overrides, "training.bf16=false"])
    before, after = (LlavaForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (assembled, out))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapted = {
        name for name in before if re.search(r"(qkv|[qkvo]_proj|\.proj|fc\d|(gate|up|down)_proj)\.weight$", name)
    }
    assert changed == adapted | {name for name in before if "multi_modal_projector" in name}


def test_a_run_with_adapters_goes_on_from_the_last_whole_checkpoint(assembled, tmp_path):
    file = llava_toy.make_data(tmp_path / "data", ("red", "blue"), ("circle", "cross"))
    overrides = [f"start={assembled}", f"conversations={file}", f"training.output_dir={tmp_path / 'out'}"]
    overrides += ["training.max_steps=4", "training.per_device_train_batch_size=2", "training.save_steps=2"]
    overrides += ["training.gradient_accumulation_steps=1", "training.bf16=false", "training.logging_steps=1"]
    overrides += ["training.save_strategy=steps", "lora.parts=[encoder, language_decoder]", "lora.dropout=0.1"]

    def trained() -> tuple[list[str], dict[str, torch.Tensor]]:
        out = llava_toy.recipe.main(llava_toy.RECIPES / "2-all.yaml", overrides)
        lines = [line for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        return lines, LlavaForConditionalGeneration.from_pretrained(out).state_dict()

    straight, before = trained()
    (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").unlink()
    again, after = trained()
    assert (tmp_path / "out" / "damaged-checkpoint-4").is_dir()
    assert len(straight) == 4
    assert again == straight
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_the_whole_way_at_toy_size(parts, tmp_path):
    """Pictures, language model and tower from nothing; assembled; projector, then all; asked."""
    found = llava_toy.run(
        tmp_path / "toy",
        parts / "unit",
        size=32,
        steps=(12, 80),
        rates=(3e-3, 1e-2),
        batch=4,
        hidden_size=48,
        pictures={"colours": ("red", "blue"), "shapes": ("circle", "cross")},
    )
    first, second = found["losses"]["1-projector"], found["losses"]["2-all"]
    assert first[-1] < first[0]
    assert second[-1] < 0.5 * second[0]
    assert len(found["answers"]) == 8
    assert sum(said == right for _, right, said in found["answers"]) >= 6
    assembled, projector = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "toy" / name).state_dict()
        for name in ("assembled", "1-projector")
    )
    changed = {name for name, value in assembled.items() if not torch.equal(value, projector[name])}
    assert changed == {name for name in assembled if "multi_modal_projector" in name}


def test_the_toys_pictures_differ():
    pictures = [llava_toy.draw(colour, shape) for colour in llava_toy.COLOURS for shape in llava_toy.SHAPES]
    assert len({picture.tobytes() for picture in pictures}) == 20
    assert all(isinstance(picture, Image.Image) for picture in pictures)
