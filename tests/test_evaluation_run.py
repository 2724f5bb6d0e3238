"""training/evaluation/run.py: who is measured by what and in which order, what is kept, what goes wrong, bad input."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from training.evaluation import run
from training.evaluation.contract import ENCODE, READ, Evaluator, Figure, NeverMeasured, NotMeasured, Options
from training.evaluation.report import load_results

ROOT = Path(__file__).parent.parent


def model_folder(path, kind="unit", weights=b"weights"):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


class Measured(Evaluator):
    """Yields what it is given, and writes down whom it measured."""

    suite = "text"

    def __init__(self, name="blocks", log=None, figures=(), settings=None, **attributes):
        self.name, self.log, self.given, self.settings = name, log if log is not None else [], figures, settings or {}
        for key, value in attributes.items():
            setattr(self, key, value)

    def fingerprint(self):
        if isinstance(self.settings, Exception):
            raise self.settings
        return self.settings

    def figures(self, subject, work):
        self.log.append((self.name, subject.name))
        work.items += [{"index": 0, "word_f1": 0.9}, {"index": 1, "word_f1": 0.1}, {"index": 2, "error": "no"}]
        for figure in self.given or [Figure("word_f1", 0.5, 0.4, 0.6, 3, 1)]:
            if isinstance(figure, BaseException):
                raise figure
            yield figure


class Peer:
    """A reader that is no checkpoint."""

    role, path, device, can = "peer", "peer", "cpu", frozenset({READ})

    def __init__(self, name="tesseract", digest="peer 1"):
        self.name, self.digest, self.released = name, digest, 0

    def hash(self):
        return self.digest

    def release(self):
        self.released += 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("training.evaluation.plots.draw", lambda *_: False)  # test_evaluation_report.py draws
    return tmp_path / "cache" / "evaluation"


@pytest.fixture
def suites(monkeypatch):
    """Puts evaluators in the place of the suites' modules."""

    def put(*evaluators, peers=(), missing=()):
        for suite, modules in run.MODULES.items():
            for number, name in enumerate(modules):
                module = types.ModuleType(name)
                mine = [each for each in evaluators if each.suite == suite] if number == 0 else []
                module.evaluators = lambda options, mine=mine: mine
                monkeypatch.setitem(sys.modules, f"training.evaluation.{name}", module)
        module = types.ModuleType("peers")
        module.subjects = lambda names, device: (list(peers), list(missing))
        monkeypatch.setitem(sys.modules, "training.evaluation.peers", module)

    return put


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "model")


def evaluated(model, out, **more):
    return run.evaluate(model, out=out, progress=False, **more)


def texts(results) -> list[str]:
    return [note["text"] for note in results["notes"]]


# --------------------------------------------------------------------------------------------------------------- order


def test_a_subject_is_measured_by_everything_and_let_go_before_the_next(tmp_path, suites, model):
    log = []
    teacher = model_folder(tmp_path / "teacher", "unit_vision_model", b"others")
    peer = Peer()
    reading = Measured("blocks", log, needs=frozenset({READ}))
    naming = Measured("pictures", log, suite="image", needs=frozenset({ENCODE}))
    kept = Measured("features", log, suite="retention", roles=frozenset({"model", "stage"}), against="teacher")
    suites(kept, naming, reading, peers=[peer])
    results = evaluated(
        model, tmp_path / "out", teacher=teacher, stages={"stage 1": teacher}, options=Options(peers=("tesseract",))
    )
    assert log == [
        ("blocks", "UNIT"),
        ("pictures", "UNIT"),
        ("features", "UNIT"),
        ("pictures", "teacher"),
        ("features", "stage 1"),
        ("blocks", "tesseract"),
    ]
    found = [(row["suite"], row["evaluator"], row["subject"]) for row in results["figures"]]
    assert found == [  # as the report has it: by suite, whatever was measured first
        ("text", "blocks", "UNIT"),
        ("text", "blocks", "tesseract"),
        ("image", "pictures", "UNIT"),
        ("image", "pictures", "teacher"),
        ("image", "pictures", "stage 1"),  # the same weights as the teacher's: not measured twice
        ("retention", "features", "UNIT"),
        ("retention", "features", "stage 1"),
    ]
    assert [(each["name"], each["role"]) for each in results["subjects"]] == [
        ("UNIT", "model"),
        ("teacher", "teacher"),
        ("stage 1", "stage"),
        ("tesseract", "peer"),
    ]
    assert peer.released


def test_who_is_measured_against_stays_until_the_last_use(tmp_path, suites, model, monkeypatch):
    events = []
    monkeypatch.setattr(run.ModelSubject, "release", lambda self: events.append(f"-{self.name}"))

    class Told(Measured):
        def figures(self, subject, work):
            events.append(f"{self.name} {subject.name}")
            return super().figures(subject, work)

    teacher = model_folder(tmp_path / "teacher", weights=b"2")
    stages = {name: model_folder(tmp_path / name, weights=name.encode()) for name in ("a", "b")}
    suites(Told("kept", suite="retention", roles=frozenset({"model", "stage"}), against="teacher"))
    evaluated(model, tmp_path / "out", teacher=teacher, stages=stages)
    measured = events.index("kept b")
    assert "-UNIT" in events[: events.index("kept a")]
    assert "-teacher" not in events[:measured]
    assert "-teacher" in events[measured:]


# --------------------------------------------------------------------------------------------------------------- cache


def test_what_is_known_is_not_measured_again(tmp_path, suites, model):
    log = []
    suites(Measured(log=log))
    first = evaluated(model, tmp_path / "one")
    second = evaluated(model, tmp_path / "two")
    assert len(log) == 1
    assert [row["cached"] for row in first["measured"] + second["measured"]] == [False, True]
    assert first["figures"] == second["figures"]
    items = (tmp_path / "two" / "items" / "text-blocks-unit.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in items] == [2, 1, 0]  # what failed, then what was read worst


@pytest.mark.parametrize("change", ["weights", "config", "data", "code", "seed", "batch", "no cache", "damage"])
def test_another_model_set_or_code_is_measured(tmp_path, suites, model, cache, monkeypatch, change):
    log, settings, more = [], {"data": "1"}, {}
    evaluator = Measured(log=log, settings=settings)
    suites(evaluator)
    evaluated(model, tmp_path / "out")
    if change == "weights":
        (Path(model) / "model.safetensors").write_bytes(b"Weights")
    elif change == "config":
        (Path(model) / "config.json").write_text('{"model_type": "unit", "a": 1}')
    elif change == "data":
        settings["data"] = "2"
    elif change == "code":
        monkeypatch.setattr(run, "hash_of_code", lambda: "other")
    elif change == "damage":
        (entry,) = cache.rglob("*.json")
        entry.write_text("{")
    else:
        more = {"seed": {"seed": 1}, "batch": {"batch_size": 3}, "no cache": {"use_cache": False}}[change]
    evaluated(model, tmp_path / "out", **more)
    assert len(log) == 2
    evaluated(model, tmp_path / "out", **({} if change == "no cache" else more))
    assert len(log) == 2


def test_another_teacher_changes_what_was_kept_and_nothing_else(tmp_path, suites, model):
    log = []
    model_only = frozenset({"model"})
    suites(
        Measured("blocks", log, roles=model_only),
        Measured("features", log, suite="retention", roles=model_only, against="teacher"),
    )
    for weights in (b"1", b"2"):
        teacher = model_folder(tmp_path / weights.decode(), weights=weights)
        evaluated(model, tmp_path / "out", teacher=teacher)
    assert log == [("blocks", "UNIT"), ("features", "UNIT"), ("features", "UNIT")]


def test_a_peers_failure_is_tried_again(tmp_path, suites, model):
    log = []
    suites(Measured(log=log, roles=frozenset({"peer"})), peers=[Peer()])  # one of its three items failed
    for _ in range(2):
        evaluated(model, tmp_path / "out", options=Options(peers=("tesseract",)))
    assert len(log) == 2


# --------------------------------------------------------------------------------------------------------- goes wrong


def test_what_cannot_be_measured_is_one_line_and_the_rest_goes_on(tmp_path, suites, model, capsys):
    suites(
        Measured("no labels", settings=NotMeasured("no labels:\n  there are none")),
        Measured("unreadable", figures=[Figure("cer", 1.0), NotMeasured("picture 3 cannot be read")]),
        Measured("broken", figures=[RuntimeError("it broke\nbadly")]),
        Measured("no number", figures=[Figure("word_f1", float("nan"))]),
        Measured("fine"),
    )
    results = evaluated(model, tmp_path / "out")
    assert texts(results) == [
        "no labels: there are none",
        "picture 3 cannot be read",
        "RuntimeError: it broke (traceback in errors.log)",
        "ValueError: word_f1 came out as nan (traceback in errors.log)",
    ]
    assert [(row["evaluator"], row["name"]) for row in results["figures"]] == [
        ("unreadable", "cer"),
        ("fine", "word_f1"),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert "text, unreadable, UNIT: picture 3 cannot be read" in lines
    assert "badly" in (tmp_path / "out" / "errors.log").read_text()
    assert "it broke (traceback" in (tmp_path / "out" / "report.md").read_text()
    again = evaluated(model, tmp_path / "out")
    assert [row["cached"] for row in again["measured"]] == [False, False, False, True]  # only what is whole is kept


def test_a_model_without_a_decoder_is_asked_once_and_the_rest_goes_on(tmp_path, suites, capsys):
    model = model_folder(tmp_path / "model", "clip_vision_model")
    reading = [Measured(name, needs=frozenset({READ})) for name in ("blocks", "pages")]
    suites(*reading, Measured("pictures", suite="image", needs=frozenset({ENCODE})))
    results = evaluated(model, tmp_path / "out")
    assert texts(results) == ["model has no language decoder and cannot read"]
    assert capsys.readouterr().err == "text: model has no language decoder and cannot read\n"
    assert [row["suite"] for row in results["figures"]] == ["image"]


def test_a_peer_that_is_not_there_is_one_line(tmp_path, suites, model, capsys):
    suites(Measured(), missing=["tesseract is not installed: apt-get install tesseract-ocr"])
    assert run.main([model, "--out", str(tmp_path / "out"), "--peers", "tesseract", "--quiet"]) == 0
    assert capsys.readouterr().err == "tesseract is not installed: apt-get install tesseract-ocr\n"
    assert "apt-get install tesseract-ocr" in (tmp_path / "out" / "report.md").read_text()


def test_no_teacher_is_one_line_that_says_how_to_name_it(tmp_path, suites, model):
    suites(Measured("features", suite="retention", against="teacher"), Measured())
    results = evaluated(model, tmp_path / "out")
    assert texts(results) == ["no teacher is known: --teacher MODEL names the encoder as it was before training"]
    assert len(results["figures"]) == 1


def test_a_teacher_is_the_start_where_no_other_is_named(tmp_path, suites, model):
    class Beside(Measured):
        def figures(self, subject, work):
            self.log.append(work.subjects[self.against].name)
            yield Figure("latency_ratio", 1.0)

    log = []
    suites(Beside("beside", log, suite="cost", roles=frozenset({"model"}), against="start"))
    teacher, start = (model_folder(tmp_path / name, weights=name.encode()) for name in ("teacher", "start"))
    evaluated(model, tmp_path / "out", teacher=teacher)
    evaluated(model, tmp_path / "out", teacher=teacher, start=start)
    assert log == ["teacher", "start"]


def test_of_several_stages_the_last_is_the_one_before_the_model(tmp_path, suites, model):
    class Beside(Measured):
        def figures(self, subject, work):
            self.log.append(work.subjects[self.against].name)
            yield Figure("gain_word_f1", 0.1)

    log = []
    suites(Beside("gain", log, suite="scale", roles=frozenset({"model"}), against="stage"))
    stages = {name: model_folder(tmp_path / name, weights=name.encode()) for name in ("a", "b")}
    evaluated(model, tmp_path / "out", stages=stages)
    assert log == ["b"]
    assert texts(evaluated(model, tmp_path / "out")) == [run.HOW_TO_NAME["stage"]]


def test_nothing_measured_is_status_one(tmp_path, suites, model, capsys):
    suites(Measured(settings=NotMeasured("blocks: no data set; `make data` builds it")))
    assert run.main([model, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "text, blocks: blocks: no data set; `make data` builds it",
        "unit evaluate: nothing could be measured; the lines above say why",
    ]


def test_a_kill_loses_nothing_that_was_measured(tmp_path, suites, model, capsys):
    log = []
    done = Measured("blocks", log)
    suites(done, Measured("pages", log, figures=[KeyboardInterrupt()]))
    assert run.main([model, "--out", str(tmp_path / "out")]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == ("unit evaluate: interrupted; what was measured is kept, and the same command goes on from there")
    assert [row["evaluator"] for row in load_results(tmp_path / "out")["figures"]] == ["blocks"]
    suites(done, Measured("pages", log))
    assert run.main([model, "--out", str(tmp_path / "out")]) == 0
    assert [name for name, _ in log] == ["blocks", "pages", "pages"]


def test_progress_counts_what_is_measured_and_quiet_is_quiet(tmp_path, suites, model, capsys):
    suites(Measured("blocks"), Measured("pages"))
    assert run.main([model, "--out", str(tmp_path / "out"), "--limit", "5"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]
    assert lines[1].endswith("text: pages, UNIT")
    assert run.main([model, "--out", str(tmp_path / "out"), "--no-cache", "--quiet"]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert "0 of 2 measures from the cache" in found.out


# ----------------------------------------------------------------------------------------------------------- who it is


def test_the_shipped_checkpoint_has_its_teacher_beside_it():
    shipped = ROOT / "modeling_unit" / "checkpoints" / "unit-tiny"
    assert run.teacher_of(str(shipped)) == f"{shipped}-teacher"


def test_the_teacher_of_a_run_is_the_one_that_its_recipe_records(tmp_path, model):
    assert run.teacher_of(model) is None
    recipe = Path(model) / "recipe.json"
    recipe.write_text(json.dumps({"teacher": str(tmp_path / "teacher")}))
    assert run.teacher_of(model) is None  # it is not there
    teacher = model_folder(tmp_path / "teacher")
    assert run.teacher_of(model) == teacher
    recipe.write_text("[")
    assert run.teacher_of(model) is None
    assert run.teacher_of("someone/on-the-hub") is None


def test_the_command_is_told_without_anybodys_home(tmp_path, suites, model, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    suites(Measured(settings=NotMeasured(f"no data set in {tmp_path}/data; make data")), Measured("pages"))
    run.main([model, "--out", str(tmp_path / "out"), "--stages", f"stage 1={model}", "--quiet"])
    results = load_results(tmp_path / "out")
    assert results["command"] == "unit evaluate ~/model --out ~/out --stages 'stage 1=~/model' --quiet"
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "report.md").read_text()


def test_options_reach_the_suites(tmp_path, suites, model, monkeypatch):
    seen = []
    suites()
    module = types.ModuleType("text_suite")
    module.evaluators = lambda options: seen.append(options) or [Measured()]
    monkeypatch.setitem(sys.modules, "training.evaluation.text_suite", module)
    arguments = [model, "--suite", "text", "--out", str(tmp_path / "out"), "--limit", "3", "--pages", str(tmp_path)]
    arguments += [
        "--sets",
        f"funsd, cord={tmp_path}",
        "--chunks",
        str(tmp_path),
        "--resolutions",
        "64,128",
        "--imagenet",
        "a/b",
        "--quiet",
    ]
    assert run.main(arguments) == 0
    assert seen == [
        Options(
            limit=3,
            pages=tmp_path,
            sets=("funsd", f"cord={tmp_path}"),
            resolutions=(64, 128),
            imagenet="a/b",
            chunks=tmp_path,
        )
    ]


def test_what_can_never_be_measured_is_found_out_once_and_said_again(tmp_path, suites, model, capsys):
    log = []
    suites(Measured("scales", log, [Figure("cka", 1.0), NeverMeasured("no positions for x4")]))
    for _ in range(2):
        results = evaluated(model, tmp_path / "out")
        assert [row["name"] for row in results["figures"]] == ["cka"]
        assert texts(results) == ["no positions for x4"]
    assert log == [("scales", "UNIT")]
    suites(Measured("nothing", log, [NeverMeasured("it has one size only")]))
    for _ in range(2):
        evaluated(model, tmp_path / "out")
        assert "it has one size only" in capsys.readouterr().err
    assert log == [("scales", "UNIT"), ("nothing", "UNIT")]


def test_what_is_missing_now_is_looked_for_again(tmp_path, suites, model):
    log = []
    suites(Measured("names", log, [NotMeasured("the sentence encoder is not installed")]))
    for _ in range(2):
        assert texts(evaluated(model, tmp_path / "out")) == ["the sentence encoder is not installed"]
    assert len(log) == 2


def test_what_an_evaluator_lacks_is_said_before_anything_is_measured(tmp_path, suites, model):
    log = []
    unlabelled = Measured("classes", log, suite="image")

    def check():
        assert log == []
        raise NotMeasured("no labels")

    unlabelled.check = check
    suites(Measured("blocks", log), unlabelled)
    results = evaluated(model, tmp_path / "out")
    assert log == [("blocks", "UNIT")]
    assert texts(results) == ["no labels"]


def test_a_teacher_without_weights_is_refused_before_anything_is_measured(tmp_path, suites, model, capsys):
    log = []
    teacher = model_folder(tmp_path / "teacher", "unit_vision_model")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    suites(Measured("blocks", log), Measured("kept", log, suite="retention", against="teacher"))
    assert run.main([model, "--teacher", teacher, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "no weights there" in capsys.readouterr().err
    assert log == []


def test_a_figure_of_the_start_is_the_starts_and_its_name_is_part_of_what_is_known(tmp_path, suites, model):
    log = []
    start = model_folder(tmp_path / "start", "unit_vision_model", b"others")
    figures = [Figure("latency", 2.0), Figure("latency", 3.0, of="start")]
    suites(Measured("in turns", log, figures, suite="cost", roles=frozenset({"model"}), against="start"))
    for start_as in ({"start": start}, {"start": start}, {"teacher": start}):
        (name,) = start_as
        results = evaluated(model, tmp_path / "out", **start_as)
        assert [(row["subject"], row["value"]) for row in results["figures"]] == [("UNIT", 2.0), (name, 3.0)]
    assert len(log) == 2  # the same weights, but figures may name whom they were taken against


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--suite", "txt"], "unknown suite 'txt'; known: text, image, scale, cost, retention"),
        (["--suite", ","], "no suite is named"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--batch-size", "0"], "batch size must be at least 1, got 0"),
        (["--blocks", "nowhere"], "--blocks nowhere: no such folder"),
        (["--resolutions", "64,big"], "--resolutions 64,big: sides in pixels"),
        (["--resolutions", "0"], "resolutions are sides in pixels, each at least 1"),
        (["--stages", "runs/stage1"], "--stages runs/stage1: NAME=MODEL"),
        (["--stages", "a=x", "a=y"], "two are called 'a'"),
        (["--teacher", "nowhere/at/all"], "nowhere/at/all: no model there"),
        (["--imagenet", "/nowhere"], "--imagenet /nowhere: no such folder"),
        (["--segmentation", "./nowhere"], "--segmentation ./nowhere: no such folder"),
        (["--text-tower", "/nowhere"], "--text-tower /nowhere: no such folder"),
        (["--sets", "mine=/nowhere"], "--sets mine=/nowhere: no such folder"),
        (["--chunks", "nowhere"], "--chunks nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, suites, model, capsys, arguments, line):
    suites(Measured())
    assert run.main([model, *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unit evaluate: ")
    assert error.count("\n") == 1
    assert line in error
    assert not (tmp_path / "out").exists()


def test_no_model_no_name_and_no_device_are_one_line_each(tmp_path, suites, model, capsys):
    suites(Measured())
    (tmp_path / "empty").mkdir()
    assert run.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "no model there" in capsys.readouterr().err
    assert run.main([model, "--stages", f"UNIT={model}", "--out", str(tmp_path / "out")]) == 2
    assert "two of those measured are called 'UNIT'" in capsys.readouterr().err
    assert run.main([model, "--device", "cuda:99", "--out", str(tmp_path / "out")]) == 2
    assert "--device cuda:99: torch cannot use it here" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- speed

COLD = """
import sys
from training.evaluation import run
from training.evaluation.contract import SUITES, NotMeasured, Options

for evaluator in run._evaluators(SUITES, Options(sets=("funsd",), resolutions=(64,)))[0]:
    try:
        evaluator.fingerprint()
    except NotMeasured as missing:
        assert str(missing)
print([name for name in ("torch", "transformers", "datasets", "matplotlib") if name in sys.modules])
"""


def test_what_every_suite_is_known_by_is_found_without_torch():
    """In a folder without any data: what is not there is said, nothing is loaded to find out."""
    process = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, cwd=ROOT, check=True)
    assert process.stdout.splitlines()[-1] == "[]"


WARM = """
import json, sys, types
from training.evaluation import run
from training.evaluation.contract import Evaluator, Figure

class One(Evaluator):
    suite, name = "text", "blocks"
    def fingerprint(self):
        return {}
    def figures(self, subject, work):
        yield Figure("word_f1", 0.5, 0.4, 0.6, 3, at={"x_height": 7})
        yield Figure("word_f1", 0.6, 0.5, 0.7, 3, at={"x_height": 14})

for name in ("text_suite", "census"):
    module = sys.modules[f"training.evaluation.{name}"] = types.ModuleType(name)
    module.evaluators = lambda options, name=name: [One()] if name == "text_suite" else []
status = run.main(["MODEL", "--suite", "text", "--out", "OUT", "--quiet"])
slow = ("torch", "transformers", "datasets", "matplotlib", "scipy", "sklearn")
print(json.dumps([status, [name for name in slow if name in sys.modules]]))
"""


def test_a_warm_run_loads_none_of_what_is_slow_to_load(tmp_path, model):
    code = WARM.replace("MODEL", model).replace("OUT", str(tmp_path / "out"))

    def loaded():
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        return json.loads(process.stdout.splitlines()[-1])

    status, modules = loaded()
    assert status == 0
    assert modules == ["matplotlib"]  # it draws; nothing here measures with torch
    drawn = (tmp_path / "out" / "text.png").stat().st_mtime_ns
    assert loaded() == [0, []]
    assert (tmp_path / "out" / "text.png").stat().st_mtime_ns == drawn
