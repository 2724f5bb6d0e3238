"""training/evaluation/report.py and plots.py: cells, tables, the page; plots drawn again only when they must be."""

import json
import os
import sys

import pytest
from PIL import Image

from training.evaluation import report
from training.evaluation.contract import Figure
from training.evaluation.plots import draw, panels_of, plot_suite
from training.evaluation.report import (
    cell,
    clock,
    evaluator_tables,
    load_results,
    machine,
    markdown_table,
    report_text,
    shown,
    summary,
    title,
    write_report,
)


def row(name, value, low=None, high=None, subject="UNIT", suite="text", evaluator="blocks", **more):
    figure = Figure(name, value, low, high, **more)
    return figure.to_dict() | {"suite": suite, "evaluator": evaluator, "subject": subject}


def results(*rows, notes=(), subjects=("UNIT", "teacher")):
    roles = dict(zip(("UNIT", "teacher", "peer"), ("model", "teacher", "peer"), strict=True))
    return {
        "format": 2,
        "model": "my-model",
        "command": "unit evaluate my-model",
        "machine": "a machine",
        "versions": {},
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 3.0,
        "subjects": [{"name": name, "role": roles[name], "path": name, "hash": "ab"} for name in subjects],
        "figures": list(rows),
        "notes": list(notes),
        "measured": [],
    }


# --------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (row("cer", 0.12345, 0.1, 1.25), "0.123 [0.100, 1.250]"),
        (row("exact", 0.5, 0.4, 0.6, items=7, failed=2), "0.500 [0.400, 0.600] (2 failed)"),
        (row("latency", 0.0123, 0.01, 0.02, unit="s"), "12.3 ms [10.0, 20.0]"),
        (row("latency", 12.3, unit="ms"), "12.3 ms"),
        (row("latency", 2500.0, unit="ms"), "2.50 s"),
        (row("time", 600.0, unit="s"), "10.0 min"),
        (row("memory", 1536.0, unit="MB"), "1.54 GB"),
        (row("memory", 42.0, unit="MB"), "42.0 MB"),
        (row("flops", 0.0123, unit="GFLOP"), "12.3 MFLOP"),
        (row("flops", 4210.0, unit="GFLOP"), "4.21 TFLOP"),
        (row("parameters", 4123456, unit=""), "4.12 M"),
        (row("words", 12345, unit=""), "12,345"),
        (row("ratio", 1.2345, unit=""), "1.23"),
        (row("difference", -0.5, unit=""), "-0.500"),
        (row("nothing", 0.0, unit="s"), "0 s"),
        (row("exact", 0.0, 0.0, 0.0), "0.000"),  # no item was otherwise: no interval
    ],
)
def test_values_are_told_in_sensible_units(figure, text):
    assert cell(figure) == text


def test_time_is_told_as_people_tell_it():
    assert [clock(each) for each in (3.21, 59.9, 245, 3720)] == ["3.2 s", "59.9 s", "4 min 05 s", "1 h 02 min"]


def test_tables_line_up_and_a_bar_in_a_name_divides_nothing():
    assert markdown_table(["a", "long name"], [["x", 1], ["yyyy", 22]]) == (
        "| a    | long name |\n| ---- | --------- |\n| x    | 1         |\n| yyyy | 22        |"
    )
    assert markdown_table(["a"], [["x|y"]]).splitlines()[2] == "| x\\|y |"


# -------------------------------------------------------------------------------------------------------------- tables


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in [lines[0], *lines[2:]]]


def test_an_axis_is_columns_from_the_easy_to_the_hard():
    rows = [
        row("word_f1", value, at={"x_height": height}, items=9) for height, value in ((3, 0.1), (14, 0.9), (7, 0.5))
    ]
    rows += [row("word_f1", 0.6, items=27), row("word_f1", 0.8, at={"x_height": 14}, subject="peer", items=9)]
    (table,) = evaluator_tables(rows, ["UNIT", "peer"])
    assert table.startswith("By height of a lower-case x, px, 9 to 27 items:")
    assert cells(table) == [
        ["", "", "all", "14", "7", "3"],
        ["word F1", "UNIT", "0.600", "0.900", "0.500", "0.100"],
        ["word F1", "peer", "-", "0.800", "-", "-"],
    ]


def test_variants_have_a_column_and_what_all_share_is_said_once():
    rows = [
        row("knn_accuracy", 0.1 * side / 64, at={"feature": feature, "resolution": side, "k": 5})
        for feature in ("class token", "patch mean")
        for side in (128, 64)
    ]
    (table,) = evaluator_tables(rows, ["UNIT"])
    assert table.startswith("UNIT, by side of the input, px, k 5:")
    assert cells(table) == [
        ["", "", "64", "128"],
        ["k-NN accuracy", "class token", "0.100", "0.200"],
        ["k-NN accuracy", "patch mean", "0.100", "0.200"],
    ]


def test_what_goes_with_a_place_stands_beside_it():
    rows = [
        row("latency", time, subject=subject, unit="ms", at={"scale": scale, "resolution": side})
        for subject in ("UNIT", "teacher")
        for scale, side, time in (("x1", 128, 10.0), ("x4", 256, 40.0))
    ]
    (table,) = evaluator_tables(rows, ["UNIT", "teacher"])
    assert cells(table)[:2] == [["", "", "128 (x1)", "256 (x4)"], ["latency", "UNIT", "10.0 ms", "40.0 ms"]]
    assert [axis for axis, _ in panels_of(rows)] == [None]  # two places are bars


def test_figures_at_one_place_are_columns_and_many_are_rows():
    few = [row("word_f1", 0.5), row("cer", 0.25, better="lower"), row("word_f1", 0.75, subject="peer")]
    (table,) = evaluator_tables(few, ["UNIT", "peer"])
    assert cells(table) == [["", "word F1", "CER ↓"], ["UNIT", "0.500", "0.250"], ["peer", "0.750", "-"]]
    many = [row(f"figure_{number}", 0.5) for number in range(10)]
    (table,) = evaluator_tables(many, ["UNIT"])
    assert cells(table)[:2] == [["", "UNIT"], ["figure 0", "0.500"]]
    assert len(cells(table)) == 11


def test_figures_share_a_table_where_their_places_do():
    rows = [row("skipped_lines", 0.25, at={"set": name}) for name in ("blocks", "pages")] + [row("skipped_lines", 0.5)]
    rows += [row("wrong_order", 0.75, at={"set": "pages"})]
    rows += [row("empty_share", 0.125, at={"set": "blank"}), row("empty_share", 0.375)]
    first, second = evaluator_tables(rows, ["UNIT"])
    assert cells(first) == [
        ["", "skipped lines", "wrong order"],
        ["blocks", "0.250", "-"],
        ["pages", "0.250", "0.750"],
        ["all", "0.500", "-"],
    ]
    assert cells(second) == [["", "empty share"], ["blank", "0.125"], ["all", "0.375"]]


def test_what_is_zero_everywhere_has_a_line_and_a_failure_is_never_hidden():
    rows = [row("word_f1", 0.5), row("exact", 0.0, 0.0, 0.0, items=9), row("exact_lines", 0.0, items=9, failed=9)]
    table, line = evaluator_tables(rows, ["UNIT"])
    assert cells(table) == [["word F1", "exact lines"], ["0.500", "0.000 (9 failed)"]]
    assert line == "0 throughout: exact."
    (table,) = evaluator_tables([row("exact", 0.0)], ["UNIT"])
    assert cells(table) == [["exact"], ["0.000"]]


def test_one_figure_is_told_in_one_unit():
    rows = [row("seconds_per_page", value, unit="s", at={"x_height": x}) for x, value in ((14, 1.25), (7, 0.75))]
    (table,) = evaluator_tables(rows, ["UNIT"])
    assert cells(table)[1] == ["seconds per page", "1.25 s", "0.750 s"]


def test_a_subject_that_goes_another_way_is_beside_the_model_with_its_own():
    rows = [
        row("zero_shot_top1", value, suite="image", evaluator="pictures", subject=subject, at={"way": way})
        for subject, way, value in (
            ("UNIT", "vision decoder", 0.3),
            ("UNIT", "class token", 0.1),
            ("teacher", "class token", 0.4),
        )
    ]
    assert cells(summary(results(*rows)))[1] == [
        "zero-shot top 1, pictures, vision decoder",
        "0.300",
        "0.400 (class token)",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("word_f1", "word F1"),
        ("cer", "CER"),
        ("gain_knn_accuracy", "gain k-NN accuracy"),
        ("zero_shot_top5", "zero-shot top 5"),
        ("text_to_image_recall1", "text to image recall 1"),
        ("segmentation_miou", "segmentation mIoU"),
        ("certain_maps", "certain maps"),
    ],
)
def test_a_figures_name_is_said_in_words(name, said):
    assert title(name) == said


def test_the_summary_takes_the_easiest_place_and_one_column_a_subject():
    rows = [row("word_f1", value, at={"x_height": height}) for height, value in ((7, 0.5), (14, 0.9))]
    rows += [
        row("parameters", 1000, subject=name, suite="cost", evaluator="encoder", unit="")
        for name in ("UNIT", "teacher")
    ]
    found = cells(summary(results(*rows)))
    assert found == [
        ["", "UNIT", "teacher"],
        ["word F1, blocks, x-height 14 px", "0.900", "-"],
        ["parameters", "1,000", "1,000"],
    ]
    assert summary(results()) == "No figures."


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_has_what_was_measured_what_was_not_and_by_which_command(tmp_path):
    notes = [
        {"suite": "text", "evaluator": "blocks", "subject": "UNIT", "text": "two of them were hard"},
        {"suite": "text", "evaluator": "funsd", "subject": "", "text": "no data set"},
        {"suite": "", "evaluator": "", "subject": "", "text": "rapidocr is not installed"},
        {"suite": "retention", "evaluator": "features", "subject": "", "text": "no teacher is known"},
    ]
    found = results(
        row("word_f1", 0.5, 0.4, 0.6), row("cosine", 0.9, suite="scale", evaluator="x1 and x4"), notes=notes
    )
    write_report(found, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    order = [
        "# Evaluation of my-model",
        "| word F1, blocks",
        "unit evaluate my-model",
        "* rapidocr is not installed",
        "## Reading",
        "Every figure is defined in `docs/evaluation.md`, section Text.",
        "![the figures of this section, drawn](text.png)",
        "### blocks",
        "* UNIT: two of them were hard",
        "* funsd: no data set",
        "## Kept from the teacher",
        "* features: no teacher is known",
        "## Across scales",
        "### x1 and x4",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "## Cost" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "scale.png", "text.png"]


def test_results_of_another_format_are_refused_in_one_line(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="no evaluation there"):
        load_results(tmp_path)
    good = results(row("word_f1", 0.5))
    for damage, line in (
        ("{", "no JSON"),
        ('{"text": {}}', "it names no format; run unit evaluate again"),
        ("[]", "it names no format"),
        ('{"format": 1}', "it is of format 1"),
        (json.dumps(good | {"figures": None}), "'figures' is missing"),
        (json.dumps(good | {"figures": [{"name": "cer"}]}), "one of 'figures' has no 'value'"),
        (json.dumps(good | {"notes": ["text"]}), "one of 'notes' has no 'text'"),
        (json.dumps(good | {"figures": [row("cer", "high")]}), "cer is no number"),
    ):
        path.write_text(damage)
        with pytest.raises(ValueError, match=line) as error:
            load_results(path)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(good))
    assert load_results(tmp_path) == good


def test_a_report_in_the_repository_links_to_the_definitions_and_another_names_them():
    root = report.Path(report.__file__).parents[2]
    if (root / "docs" / "evaluation.md").is_file():  # a checkout
        assert report._link_to_definitions(root / "docs" / "evaluation" / "unit-tiny") == "../../evaluation.md"
    assert report._link_to_definitions(report.Path("/elsewhere")) is None
    page = report_text(results(row("word_f1", 0.5)) | {"definitions": "../evaluation.md"})
    assert "[docs/evaluation.md](../evaluation.md#text), section Text." in page


def test_a_note_on_several_subjects_is_said_once():
    notes = [
        {"suite": "text", "evaluator": "blocks", "subject": who, "text": f"{who}: ten of them"}
        for who in ("UNIT", "peer")
    ]
    page = report_text(results(row("word_f1", 0.5), notes=notes))
    assert "* UNIT, peer: ten of them" in page
    assert page.count("ten of them") == 1


def test_nobodys_home_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(report.Path, "home", lambda: report.Path("/home/me"))
    assert shown("/home/me/runs/a") == "~/runs/a"
    assert shown("cord=/home/me/cord") == "cord=~/cord"
    assert shown("nothing in /home/me/a, or /home/me") == "nothing in ~/a, or ~"
    assert shown("/home/mean/a /srv/home/me/b") == "/home/mean/a /srv/home/me/b"


def test_the_machine_is_told_with_its_threads(monkeypatch):
    monkeypatch.setattr(report, "threads", lambda: 1)
    assert ", 1 thread; Python " in machine()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert report.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert report.threads() == len(os.sched_getaffinity(0))


# --------------------------------------------------------------------------------------------------------------- plots


def test_panels_are_lines_along_an_axis_and_bars_of_one_name():
    heights = [row("word_f1", 0.5, at={"x_height": height}, evaluator=name) for name in "ab" for height in (3, 5, 7)]
    whole = [row("word_f1", 0.6, evaluator="a")]  # over all heights: in the table, not on the line
    alone = [row("word_f1", 0.5, evaluator=name) for name in "cd"]
    two = [row("word_f1", 0.5, evaluator="e", at={"x_height": height}) for height in (14, 20)]
    two += [row("word_f1", 0.5, evaluator="e")]  # two places are no line: what is over both is the bar
    found = panels_of([*heights, *whole, *alone, *two])
    assert [(axis, [each["evaluator"] for each in rows]) for axis, rows in found] == [
        ("x_height", ["a", "a", "a"]),
        ("x_height", ["b", "b", "b"]),
        (None, ["c", "d", "e"]),
    ]


def test_bars_of_other_suites_than_text_stay_with_their_evaluator():
    rows = [
        row("peak_memory", value, subject=subject, suite="cost", evaluator=name, unit="MB")
        for name, value in (("encoder", 15.0), ("reading a page", 600.0))
        for subject in ("UNIT", "teacher")
    ]
    assert [{row["evaluator"] for row in found} for _, found in panels_of(rows)] == [{"encoder"}, {"reading a page"}]


def test_variants_have_panels_of_their_own_where_lines_would_be_too_many():
    def rows(subjects):
        at = [{"feature": feature, "resolution": side} for feature in ("cls", "mean") for side in (64, 128, 256)]
        at.append({"feature": "patches", "resolution": 64})  # a dot is no line
        return [row("knn_accuracy", 0.5, at=each, subject=subject) for subject in subjects for each in at]

    assert [len(found) for _, found in panels_of(rows(["UNIT"]))] == [6]
    assert [len(found) for _, found in panels_of(rows(["UNIT", "teacher"]))] == [12]
    assert [len(found) for _, found in panels_of(rows(["UNIT", "teacher", "stage 1"]))] == [9, 9]


def test_a_bar_alone_is_left_to_the_table_where_there_is_more_to_draw():
    lone = row("cold_start", 3.0, unit="s", suite="cost")
    pair = [row("latency", 3.0, unit="s", suite="cost", subject=subject) for subject in ("UNIT", "teacher")]
    assert [found[0]["name"] for _, found in panels_of([lone, *pair])] == ["latency"]
    assert len(panels_of([lone])) == 1


def test_a_plot_is_drawn_again_only_when_its_figures_change(tmp_path):
    path = tmp_path / "text.png"
    found = results(row("word_f1", 0.5, 0.4, 0.6), row("cer", 1.5, 1.4, 1.6, better="lower"))
    assert plot_suite(found, "text", path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert plot_suite(found | {"seconds": 9.0}, "text", path)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    assert plot_suite(results(row("word_f1", 0.6, 0.5, 0.7)), "text", path)
    assert path.read_bytes() != before[1]
    path.write_bytes(b"no picture")
    assert plot_suite(found, "text", path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    assert not plot_suite(found, "image", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_many_subjects_and_long_names_are_drawn(tmp_path):
    names = [f"a stage with quite a long name {number}" for number in range(9)]
    rows = [row("latency", 1e-3 * n, subject=name, unit="s", evaluator="e" * 60) for n, name in enumerate(names)]
    rows += [row("loss", -0.5, -0.6, -0.4, subject=names[0], unit="", evaluator="f", at={"way": "w" * 80})]
    assert draw(rows, names, tmp_path / "many.png", "heading")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width < 3000


def test_the_page_of_nothing_is_a_page():
    assert "No figures." in report_text(results())


def test_the_summary_takes_print_and_small_type_and_the_scale_that_is_trained():
    at = [{"x_height": height} for height in (14, 10, 7, 5, 3)]
    rows = [row("word_f1", 0.1 * n, suite="text", evaluator="blocks", at=where) for n, where in enumerate(at)]
    sides = [({"resolution": 64}, 0.6), ({"resolution": 256, "scale": "x4"}, 0.7)]
    rows += [row("cka", value, suite="scale", evaluator="pictures at two scales", at=where) for where, value in sides]
    lines = report.summary({"subjects": [{"name": "UNIT", "role": "model"}], "figures": rows}).splitlines()[2:]
    told = [" ".join(line.replace("|", " ").split()) for line in lines]
    assert told == [
        "word F1, blocks, x-height 10 px 0.100",
        "word F1, blocks, x-height 5 px 0.300",
        "CKA, features of pictures at x1, to those at 256 px, x4 0.700",
    ]
