"""lmms-eval on LLaVA models with UNIT's tower: the plugin, tasks from a file, figures from what lmms-eval writes.

lmms-eval itself is asked in the last test, which is passed over where it is not installed; the others meet its
interface as it is in 0.7.3, in stand-ins.
"""

import importlib
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from training.evaluation import lmms
from training.evaluation.contract import NotMeasured
from training.evaluation.lmms import environment
from training.evaluation.lmms.answering import LlavaAnswerer, Question
from training.evaluation.lmms.local import TEMPLATE, marks, read_local, write_task
from training.evaluation.lmms.models import AVAILABLE_MODELS
from training.evaluation.lmms.run import Settings, _reason, evaluate, figures_of
from training.evaluation.peers import environment as peers
from training.llava_assembly import assemble
from training.llava_toy import draw, make_language_model
from unit_cli.__main__ import main

QUESTIONS = ("What colour is it?", "What shape?", "Is it, all in all, a rather large thing?")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA with random weights and UNIT's tower, and three pictures beside it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("lmms")
    tiny.unit_model(text=tiny.QWEN3).save_pretrained(root / "unit")
    tiny.processor().save_pretrained(root / "unit")
    make_language_model(root / "llama", hidden_size=32)
    assemble(str(root / "unit"), str(root / "llama"), root / "llava", size=32)
    for colour in ("red", "green", "blue"):
        draw(colour, "circle", side=50).save(root / f"{colour}.png")
    return root


@pytest.fixture(scope="module")
def answerer(llava):
    return LlavaAnswerer(str(llava / "llava"))


def picture(llava, colour="red"):
    return Image.open(llava / f"{colour}.png")


def said_by_transformers(llava, question: str, image: Image.Image, tokens: int) -> str:
    """The answer to one question, without anything of the plugin's."""
    model = LlavaForConditionalGeneration.from_pretrained(llava / "llava").eval()
    processor = LlavaProcessor.from_pretrained(llava / "llava")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{question}"}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# -- a file of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answers", "exact", "anls", "relaxed"),
    [
        ("Red", ["red"], 1, 1, 1),
        (" dark  red ", ["Dark red"], 1, 1, 1),
        ("kitten", ["sitting"], 0, 1 - 3 / 7, 0),  # the textbook's three edits
        ("abcd", ["abxy"], 0, 0, 0),  # similarity 0.5 is not above it
        ("104", ["100"], 0, 1 - 1 / 3, 1),
        ("106", ["100"], 0, 1 - 1 / 3, 0),
        ("-95.1", ["-100"], 0, 0, 1),
        ("12%", ["0.12"], 0, 0, 1),
        ("0", ["0"], 1, 1, 1),
        ("0.01", ["0"], 0, 0, 0),
        ("nan", ["100"], 0, 0, 0),
        ("Miller", ["Smith", "miller"], 1, 1, 1),
        ("", ["red"], 0, 0, 0),
    ],
)
def test_marks_are_those_of_the_definitions(said, answers, exact, anls, relaxed):
    anls = anls if anls > 0.5 else 0.0
    assert marks(said, answers) == pytest.approx(
        {"exact_match": exact, "anls": anls, "relaxed_accuracy": relaxed}, abs=1e-12
    )


def lines_of(path, *entries):
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries) + "\n")
    return path


def entry(**changes):
    return {"image": "red.png", "question": "What colour is it?", "answer": "red"} | changes


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "holds no questions"),
        (["{"], "line 1 is no JSON object"),
        (["[1]"], "line 1 is no JSON object, but list"),
        ([entry(), "", entry(answer=None)], "line 3 has no 'answer'; every line needs image, question, answer"),
        ([entry(answer=[])], "line 1 has no 'answer'"),
        ([{"image": "red.png", "answer": "red"}], "line 1 has no 'question'"),
        ([entry(question=5)], "line 1: 'question' must be text, not int"),
        ([entry(answer={"text": "red"})], "line 1: 'answer' must be a text, a number, or a list of them"),
        ([entry(answer=["red", " "])], "line 1: 'answer' must not be empty"),
        ([entry(image="gone.png")], "none of its 1 images is there"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_with_its_line(llava, lines, told):
    path = lines_of(llava / "questions.jsonl", *lines)
    with pytest.raises(ValueError, match=r"questions\.jsonl") as caught:
        read_local(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.jsonl: cannot be read \(No such file or directory\)"):
        read_local(tmp_path / "nothing.jsonl")


def test_a_missing_picture_is_told_and_its_question_stays(llava):
    path = lines_of(llava / "questions.jsonl", entry(), entry(image="gone.png"), entry(answer=["red", 5, 1.5]))
    rows, notes = read_local(path)
    assert [row["answers"] for row in rows] == [["red"], ["red"], ["red", "5", "1.5"]]
    assert notes == [f"{path}, line 2: there is no image gone.png; the question counts as wrong."]


def test_a_task_is_a_file_that_lmms_eval_can_read(llava, tmp_path):
    path = lines_of(llava / "questions.jsonl", entry())
    name, notes = write_task("my-shapes", path, tmp_path / "tasks")
    assert (name, notes) == ("local_my-shapes", [])
    written = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
    assert written["task"] == name
    (row,) = map(json.loads, Path(written["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines())
    assert row == {"image": str(llava / "red.png"), "question": "What colour is it?", "answers": ["red"]}
    assert written["include"] == str(TEMPLATE)
    # lmms-eval takes the words behind !function for MODULE.FUNCTION, and looks beside the file first
    for function in (line.split()[-1] for line in TEMPLATE.read_text().splitlines() if "!function" in line):
        module, _, attribute = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))
    with pytest.raises(ValueError, match="cannot be the name of a task"):
        write_task("a,b", path, tmp_path)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_in_a_batch_are_those_of_transformers_one_by_one(llava, answerer):
    asked = list(zip(QUESTIONS, ("red", "green", "blue"), strict=True))
    questions = [Question(text, lambda colour=colour: [picture(llava, colour)]) for text, colour in asked]
    answers = answerer.answer(questions, {"max_new_tokens": 7})
    assert answers == [said_by_transformers(llava, text, picture(llava, colour), 7) for text, colour in asked]


def test_an_answer_ends_where_the_task_says(llava, answerer):
    question = Question(QUESTIONS[0], lambda: [picture(llava)])
    (whole,) = answerer.answer([question], {"max_new_tokens": 8})
    assert len(whole) > 3
    assert answerer.answer([question], {"max_new_tokens": 8, "until": [whole[2]]}) == [whole[: whole.index(whole[2])]]
    assert answerer.answer([question], {"max_new_tokens": 8, "until": "never said"}) == [whole]


def test_a_picture_stands_where_the_question_has_it_or_in_front(llava, answerer):
    plain, marked = (Question(text, lambda: [picture(llava)]) for text in ("What?", "<image>\nWhat?"))
    assert answerer.answer([plain], {"max_new_tokens": 6}) == answerer.answer([marked], {"max_new_tokens": 6})
    with pytest.raises(ValueError, match=r'1 pictures for 2 places: "<image> or <image>'):
        answerer.answer([Question("<image> or <image>?", lambda: [picture(llava)])])
    with pytest.raises(ValueError, match="a picture was expected, not str: no video"):
        answerer.answer([Question("What happens?", lambda: ["film.mp4"])])


def test_a_question_longer_than_the_language_model_is_refused(llava, answerer):
    with pytest.raises(ValueError, match="tokens asked; the language model has places for 512"):
        answerer.answer([Question("long " * 120, lambda: [picture(llava)])])


def test_losses_are_those_of_llava_on_the_answer_alone(llava, answerer):
    answers = ("red", "a very green thing")
    questions = [Question(QUESTIONS[0], lambda: [picture(llava)], answer) for answer in answers]
    found = answerer.losses(questions)
    model = LlavaForConditionalGeneration.from_pretrained(llava / "llava").eval()
    processor = LlavaProcessor.from_pretrained(llava / "llava")
    for answer, (loss, greedy) in zip(answers, found, strict=True):
        turns = [{"role": "user", "content": f"<image>\n{QUESTIONS[0]}"}, {"role": "assistant", "content": answer}]
        prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
        inputs = processor(images=picture(llava), text=processor.apply_chat_template(turns), return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : processor(images=picture(llava), text=prompt, return_tensors="pt")["input_ids"].shape[1]] = -100
        with torch.no_grad():
            assert loss == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-4)
        assert greedy is False


def test_half_precision_as_on_a_gpu_answers_too(llava):
    half = LlavaAnswerer(str(llava / "llava"), dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    question = Question(QUESTIONS[0], lambda: [picture(llava)], "red")
    assert len(half.answer([question], {"max_new_tokens": 3})) == 1
    assert half.losses([question])[0][0] == pytest.approx(math.log(263), rel=0.2)  # knows nothing: 263 pieces


def test_what_is_no_llava_is_refused_in_one_line(llava, tmp_path):
    with pytest.raises(ValueError, match="a 'unit' checkpoint, no LLaVA; `unit llava` makes one"):
        LlavaAnswerer(str(llava / "unit"))
    with pytest.raises(ValueError, match="there is no dtype 'float5'"):
        LlavaAnswerer(str(llava / "llava"), dtype="float5")


# -- lmms-eval's interface --------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    """The model's class, on a stand-in of lmms-eval's base class."""

    class Base:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        def clean(self):
            self.cleaned = True

    packages = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")}
    packages["lmms_eval.api.model"].lmms = Base
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    name = "training.evaluation.lmms.models.unit_llava"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).UnitLlava
    sys.modules.pop(name, None)


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_the_plugin_is_found_by_either_way():
    ((file, name),) = AVAILABLE_MODELS.items()
    assert f"{lmms.__name__}.models.{file}.{name}" == lmms.CLASS_PATH
    assert file == lmms.MODEL
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    assert '"lmms_eval.models": ["unit = training.evaluation.lmms:manifest"]' in setup


def test_requests_are_answered_in_their_order_and_what_fails_is_counted(plugin, llava, answerer, tmp_path):
    model = plugin(str(llava / "llava"), device="cpu", batch_size="2", failures=str(tmp_path / "failures.jsonl"))
    docs = [{"image": "red.png"}, {"image": "green.png"}, {"image": "gone.png"}, {"image": "blue.png"}]
    model.task_dict = {"shapes": {"test": docs}}

    def visual(doc):
        return [Image.open(llava / doc["image"])]

    texts = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[1], QUESTIONS[1]]
    settings = [{"max_new_tokens": 5}, {"max_new_tokens": 3}, {"max_new_tokens": 5}, {"max_new_tokens": 5}]
    asked = [request(text, settings[i], visual, i, "shapes", "test") for i, text in enumerate(texts)]
    answers = model.generate_until(asked)
    for index in (0, 1, 3):
        colour = docs[index]["image"].removesuffix(".png")
        tokens = settings[index]["max_new_tokens"]
        assert answers[index] == said_by_transformers(llava, texts[index], picture(llava, colour), tokens)
    assert answers[2] == ""
    assert model.failed == 1
    (told,) = map(json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())
    assert (told["task"], told["doc_id"]) == ("shapes", 2)
    assert "gone.png" in told["error"]
    assert settings[0] == {"max_new_tokens": 5}  # the task's own, left as they were
    model.clean()
    assert (model.answerer, model.cleaned) == (None, True)


def test_multiple_choice_gets_losses_the_smallest_of_which_is_taken(plugin, llava, answerer, capsys):
    model = plugin(str(llava / "llava"), device="cpu", batch_size=3)
    model.task_dict = {"quiz": {"test": [{"image": "red.png", "right": "red"}, {"image": "gone.png"}]}}

    def visual(doc):
        return [Image.open(llava / doc["image"])]

    asked = [request("Which?", choice, visual, 0, "quiz", "test") for choice in (" red", " dark blue")]
    asked += [request("Which?", lambda doc: doc["right"], visual, 0, "quiz", "test")]
    asked += [request("Which?", " red", visual, 1, "quiz", "test")]
    (red, blue, again, failed) = model.loglikelihood(asked)
    alone = answerer.losses([Question("Which?", lambda: [picture(llava)], "red")])[0][0]
    assert red[0] == pytest.approx(alone, rel=1e-4)
    assert again == pytest.approx(red)
    assert blue[0] != pytest.approx(alone, rel=1e-3)
    assert failed == (math.inf, False)
    assert "unit_llava: quiz, 1: [Errno 2]" in capsys.readouterr().err


def test_text_alone_is_answered_too(plugin, llava):
    model = plugin(str(llava / "llava"), device="cpu")
    model.task_dict = {"talk": {"test": [{}]}}
    (answer,) = model.generate_until([request("Who?", {"max_new_tokens": 3}, lambda doc: None, 0, "talk", "test")])
    assert (isinstance(answer, str), model.failed) == (True, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"batch_size": "auto"}, "takes a number of at least 1 as --batch_size, got 'auto'"),
        ({"batch_size": 0}, "takes a number of at least 1"),
        ({"atn": "sdpa"}, "has no argument atn"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(plugin, llava, arguments, told):
    with pytest.raises(ValueError, match=told):
        plugin(str(llava / "llava"), **arguments)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_have_the_intervals_of_their_questions():
    row = {"alias": "docs", "anls,none": 0.5, "anls_stderr,none": 0.1, "mme,none": 1500.0, "mme_stderr,none": "N/A"}
    row |= {"acc,strict": 0.25, "acc_stderr,strict": 0.05, "submission,none": {"a": 1}, "empty,none": []}
    samples = [{"anls": 1.0, "mme": {"score": 1}, "acc": 1}, {"anls": 0.0, "mme": {"score": 0}, "acc": 0}]
    figures, notes = figures_of(row, {"anls": True, "acc": False}, samples, failed=1)
    anls, mme, acc = figures
    assert (anls.name, anls.value, anls.items, anls.failed, anls.unit) == ("anls", 0.5, 2, 1, "share")
    assert (anls.low, anls.high, anls.better) == (0.0, 1.0, "higher")  # of two, one right: all is possible
    assert (mme.value, mme.low, mme.high, mme.unit, mme.better) == (1500.0, None, None, "", "")
    # 0.25 is not the mean of what its questions have: lmms-eval's own standard error, 1.96 of them either way
    assert (acc.low, acc.high, acc.at, acc.better) == (
        pytest.approx(0.152),
        pytest.approx(0.348),
        {"filter": "strict"},
        "lower",
    )
    assert notes == ["submission is no number; it stands in lmms-eval's own results."]


def test_questions_about_one_picture_stand_and_fall_together():
    samples = [{"anls": float(index // 4), "input_media": [f"{index // 4}.png"]} for index in range(8)]
    ((together,), _) = figures_of({"anls,none": 0.5}, {}, samples)
    ((apart,), _) = figures_of({"anls,none": 0.5}, {}, [{"anls": sample["anls"]} for sample in samples])
    assert (together.low, together.high) == (0.0, 1.0)  # two pictures, not eight questions
    assert 0 < apart.low < apart.high < 1


# -- the command ------------------------------------------------------------------------------------------------------

STAND_IN = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("model", "tasks", "model_args", "batch_size", "seed", "output_path", "timezone", "include_path", "limit"):
    parser.add_argument("--" + name)
parser.add_argument("--log_samples", action="store_true")
given = parser.parse_args()
tasks = given.tasks.split(",")
arguments = dict(one.split("=") for one in given.model_args.split(","))
assert given.model == "unit_llava" and "training.evaluation.lmms" in os.environ["LMMS_EVAL_PLUGINS"].split(",")
import training.evaluation.lmms
sys.stderr.write("\\rbar 1/1\\r")
if "broken" in tasks:
    print("\\x1b[1mError during evaluation: RetryError[...]. Please set `--verbosity=DEBUG`")
    sys.stderr.write("pkg.errors.LocalTokenNotFoundError: Token is required\\ntenacity.RetryError: RetryError[...]\\n")
    sys.exit(0)
out = pathlib.Path(given.output_path) / "model"
out.mkdir(parents=True, exist_ok=True)
stamp = "-".join(tasks)
results = {task: {"alias": task, "exact_match,none": 0.5} for task in tasks}
higher = {task: {"exact_match": True} for task in tasks}
(out / (stamp + "_results.json")).write_text(json.dumps({"results": results, "higher_is_better": higher}))
for task in tasks:
    lines = [{"doc_id": i, "exact_match": float(i)} for i in range(2)]
    (out / f"{stamp}_samples_{task}.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
with open(arguments["failures"], "a") as file:
    file.write(json.dumps({"task": "local_mine", "doc_id": 0, "error": "broken file"}) + "\\n")
"""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "\rbar 3/4\rpkg.errors.TokenError: Token is\x1b[0m required\ntenacity.RetryError: five\n",
            "TokenError: Token is required",
        ),
        ("ValueError: first\nlater\nKeyError: 'last'\n", "KeyError: 'last'"),
        ("killed\n", "exit status -9"),
    ],
)
def test_the_reason_is_the_last_error_that_tells_something(said, reason):
    assert _reason(said, -9) == reason


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in the place of lmms-eval, which checks how it was called and writes files of the same shape."""
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return sys.executable


def test_one_task_that_cannot_be_run_leaves_the_others(llava, tmp_path, stand_in, capsys):
    path = lines_of(llava / "questions.jsonl", entry(), entry(image="gone.png"))
    command = ["lmms", str(llava / "llava"), "--tasks", f"broken,mine={path}", "--out", str(tmp_path / "out")]
    assert main([*command, "--python", stand_in, "--limit", "2"]) == 2
    said = capsys.readouterr()
    assert "| 0.500 [0.000, 1.000] (1 failed) |" in said.out
    reason = "lmms-eval gave no results: LocalTokenNotFoundError: Token is required"
    assert f"unit lmms: broken: {reason}" in said.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (figure,) = results["figures"]
    assert (figure["suite"], figure["evaluator"], figure["subject"]) == ("vision-language", "mine", "LLaVA")
    assert (figure["name"], figure["items"], figure["failed"]) == ("exact_match", 2, 1)
    notes = {(note["evaluator"], note["text"].split(" (")[0]) for note in results["notes"]}
    assert ("broken", reason) in notes
    assert ("mine", "1 questions failed and count as wrong; the first: broken file") in notes
    assert any("there is no image gone.png" in text for _, text in notes)
    assert results["versions"]["lmms-eval"] == "unknown"  # a stand-in has none
    (measured,) = results["measured"]
    assert (tmp_path / "out" / measured["items"]).is_file()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## mine" in report
    assert "## broken" in report


@pytest.mark.parametrize(
    ("model", "tasks", "more", "told"),
    [
        ("llava", "", [], "no tasks; name some"),
        ("unit", "chartqa", [], "a 'unit' checkpoint, no LLaVA"),
        ("nothing", "chartqa", [], "no model there"),
        ("llava", "mine=nothing.jsonl", [], "nothing.jsonl: cannot be read"),
        ("llava", "chartqa,chartqa", [], "two tasks are called 'chartqa'"),
        ("llava", "chartqa", ["--python", "no-such-python"], "--python no-such-python: cannot be started"),
        ("llava", "chartqa", ["--python", sys.executable], "there is no lmms-eval there"),
        (None, "chartqa", [], "MODEL and --tasks are needed"),
    ],
)
def test_bad_input_is_one_line(llava, tmp_path, stand_in, monkeypatch, capsys, model, tasks, more, told):
    if sys.executable in more:
        monkeypatch.delenv("PYTHONPATH")
    command = ["lmms", *([str(llava / model)] if model else []), "--tasks", tasks, "--out", str(tmp_path / "out")]
    assert main([*command, *(more or ["--python", stand_in])]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("unit lmms: ")
    assert told in said
    assert "\n" not in said


def test_without_lmms_eval_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    with pytest.raises(NotMeasured, match="`unit lmms --install` makes an environment for it"):
        environment.python()


def test_its_environment_sees_ours_and_brings_no_torch(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    done = SimpleNamespace(returncode=0, stdout="lmms_eval==0.7.3\n")
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **more: done)
    monkeypatch.setattr(peers, "_pip", lambda command, what, progress: commands.append(command[3:]))
    folder = environment.install(progress=False)
    assert environment.python_of(environment.NAME) == folder / "bin" / "python"
    alone, rest = commands
    assert alone[-2:] == ["--no-deps", "lmms-eval==0.7.3"]  # whose dependencies would bring torchvision and wandb
    assert rest[-len(environment.PACKAGES) :] == list(environment.PACKAGES)
    assert "--no-deps" not in rest
    assert not any(one.startswith(("torch", "wandb")) for one in rest)
    (inherited,) = folder.glob("lib/python*/site-packages/*.pth")
    assert str(Path(torch.__file__).parents[1]) in inherited.read_text().splitlines()


def test_lmms_eval_itself_asks_the_model_and_marks_it(llava, tmp_path):
    """The whole way: half of the answers in the file are what the model says, by transformers alone."""
    try:
        python = environment.python(os.environ.get("UNIT_LMMS_PYTHON"))
    except NotMeasured as missing:
        pytest.skip(str(missing))
    colours = ("red", "green", "blue", "red")
    texts = (*QUESTIONS, "And what else?")
    said = [said_by_transformers(llava, text, picture(llava, c), 4) for text, c in zip(texts, colours, strict=True)]
    assert all(one.strip() for one in said)
    answers = [said[0], "zebra", said[2], ["zebra", said[3]]]
    entries = [
        entry(image=f"{colour}.png", question=text, answer=answer)
        for colour, text, answer in zip(colours, texts, answers, strict=True)
    ]
    path = lines_of(llava / "questions.jsonl", *entries, entry(image="gone.png"))
    settings = Settings(batch_size=2, device="cpu", gen_kwargs="max_new_tokens=4", python=python)
    results = evaluate(str(llava / "llava"), [f"mine={path}"], tmp_path / "out", settings, progress=False)
    assert results["versions"]["lmms-eval"].startswith("0.7.")
    figures = {figure["name"]: figure for figure in results["figures"]}
    assert set(figures) == {"exact_match", "anls", "relaxed_accuracy"}
    assert figures["exact_match"]["value"] == pytest.approx(3 / 5)
    assert {(figure["items"], figure["failed"]) for figure in figures.values()} == {(5, 1)}
    assert 0 <= figures["exact_match"]["low"] < 3 / 5 < figures["exact_match"]["high"] <= 1
