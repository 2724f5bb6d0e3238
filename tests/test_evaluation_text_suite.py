"""training/evaluation/{readings,text_suite}.py: subjects and sets made by hand, read once, measured per x-height."""

from dataclasses import dataclass, field, replace

import pytest
from PIL import Image

from training.evaluation import text_suite
from training.evaluation.cache import Cache
from training.evaluation.contract import NotMeasured, Options, TextSample, Work
from training.evaluation.readings import read_set
from training.evaluation.subjects import ModelSubject, ReadText
from training.evaluation.text_suite import TextEvaluator, nearest


def sample(index: int, text: str, x_height: float = 10.0, size=(16, 16), **more) -> TextSample:
    return TextSample(index, Image.new("RGB", size), text, x_height, **more)


@dataclass
class Set:
    """As training.evaluation.sets.TextSet, of samples at hand."""

    content: list[TextSample]
    heights: tuple[float, ...] = ()
    markdown: bool = False
    name: str = "made"
    asked: list = field(default_factory=list)

    def fingerprint(self):
        return {"set": self.name}

    def samples(self, limit=None):
        self.asked.append(limit)
        return [replace(one, markdown=self.markdown) for one in self.content[:limit]]


class Echo:
    """Reads what stands there, by way of the samples themselves; and notes each batch."""

    name, role, path, device = "echo", "model", "echo", "cpu"

    def __init__(self, answer=lambda sample: sample.text):
        self.answer, self.batches = answer, []

    def hash(self):
        return "echo"

    def read(self, samples):
        self.batches.append([one.index for one in samples])
        return [self.answer(one) for one in samples]


def quiet(**more) -> Work:
    return Work(progress=False, **more)


def by_name(figures, **at):
    return {figure.name: figure for figure in figures if dict(figure.at) == at}


# ----------------------------------------------------------------------------------------------------------- readings


def test_batches_are_of_like_size_the_largest_first_and_readings_in_the_order_of_the_set():
    sizes = [(10, 10), (40, 40), (20, 20), (30, 30)]
    texts = Set([sample(n, f"text {n}", size=size) for n, size in enumerate(sizes)])
    reader = Echo()
    found = read_set(reader, texts, None, quiet(batch_size=2))
    assert reader.batches == [[1, 3], [2, 0]]
    assert [one.prediction for one in found] == ["text 0", "text 1", "text 2", "text 3"]


def test_a_set_is_read_once():
    reader, texts = Echo(), Set([sample(0, "a"), sample(1, "b")])
    assert read_set(reader, texts, 2, quiet()) == read_set(reader, texts, 2, quiet())
    assert len(reader.batches) == 1
    read_set(reader, texts, 1, quiet())  # of another choice nothing is known
    assert len(reader.batches) == 2


def test_another_run_takes_readings_from_the_cache_and_no_image_is_opened(tmp_path):
    first, texts = Echo(lambda one: f"read {one.text}"), Set([sample(0, "a"), sample(1, "b")])
    found = read_set(first, texts, None, quiet(cache=Cache(tmp_path)))
    second, again = Echo(), Set(texts.content)
    assert read_set(second, again, None, quiet(cache=Cache(tmp_path))) == found
    assert (second.batches, again.asked) == ([], [])


def test_an_item_that_fails_alone_counts_as_failed_and_the_others_are_read():
    def answer(one):
        if one.text == "bad":
            raise RuntimeError("cannot\nread this")
        return one.text

    found = read_set(Echo(answer), Set([sample(0, "one"), sample(1, "bad"), sample(2, "two")]), None, quiet())
    assert [one.prediction for one in found] == ["one", "", "two"]
    assert [one.error for one in found] == ["", "RuntimeError: cannot read this", ""]


def test_readings_with_an_error_are_not_kept_for_the_next_run(tmp_path):
    def fail(one):
        raise OSError("gone")

    texts = Set([sample(0, "a")])
    read_set(Echo(fail), texts, None, quiet(cache=Cache(tmp_path)))
    assert read_set(Echo(), texts, None, quiet(cache=Cache(tmp_path)))[0].prediction == "a"


def test_an_image_that_cannot_be_decoded_is_a_failed_item_and_nobody_is_asked():
    broken = TextSample(0, None, "a", error="OSError: truncated file")
    reader = Echo()
    found = read_set(reader, Set([broken, sample(1, "b")]), None, quiet())
    assert (found[0].error, found[0].prediction, found[1].prediction) == ("OSError: truncated file", "", "b")
    assert reader.batches == [[1]]


def test_a_subject_that_drops_an_answer_fails_at_every_item():
    class Mute(Echo):
        def read(self, samples):
            return []

    found = read_set(Mute(), Set([sample(0, "a")]), None, quiet())
    assert found[0].error == "ValueError: echo returned 0 texts for 1 images"


def test_a_subject_that_is_not_there_at_all_is_not_counted_as_failing():
    def answer(one):
        raise NotMeasured("not installed")

    with pytest.raises(NotMeasured, match="not installed"):
        read_set(Echo(answer), Set([sample(0, "a")]), None, quiet())


def test_seconds_errors_and_remarks_of_a_subject_that_tells_them_are_kept():
    class Telling(Echo):
        def readings(self, samples):
            return [ReadText(one.text, 2.0 + one.index, remarks=("repetition stopped",)) for one in samples]

    found = read_set(Telling(), Set([sample(0, "a"), sample(1, "b")]), None, quiet())
    assert [one.seconds for one in found] == [2.0, 3.0]
    assert found[0].remarks == ("repetition stopped",)


# --------------------------------------------------------------------------------------------------------- evaluator


def test_a_set_at_several_x_heights_has_figures_at_each():
    content = [sample(n, "a b", height) for n, height in enumerate([14.0, 14.0, 7.0, 7.0])]
    reader = Echo(lambda one: "a b" if one.x_height > 10 else "a x")
    figures = list(TextEvaluator(Set(content, heights=(14.0, 7.0))).figures(reader, quiet()))
    assert by_name(figures) == {}  # no mixture of them
    assert by_name(figures, x_height=14.0)["word_f1"].value == 1.0
    assert by_name(figures, x_height=7.0)["word_f1"].value == 0.5
    assert by_name(figures, x_height=7.0)["word_f1"].items == 2


def test_another_set_has_figures_over_all_and_at_the_steps_that_have_enough():
    heights = [8.8] * 5 + [13.1] * 5 + [27.0]
    work = quiet()
    figures = list(TextEvaluator(Set([sample(n, "a", h) for n, h in enumerate(heights)])).figures(Echo(), work))
    assert by_name(figures)["word_f1"].items == 11
    assert by_name(figures, x_height=10.0)["word_f1"].items == 5
    assert by_name(figures, x_height=14.0)["word_f1"].items == 5
    assert by_name(figures, x_height=28.0) == {}
    assert work.notes == ["x-heights are as they come, told to the nearest of 10, 14 px."]


def test_a_set_of_one_size_of_type_has_no_axis():
    work = quiet()
    figures = list(TextEvaluator(Set([sample(n, "a") for n in range(9)])).figures(Echo(), work))
    assert {tuple(figure.at) for figure in figures} == {()}
    assert work.notes == []


def test_nearest_is_by_ratio():
    assert nearest(8.4, (7.0, 10.0)) == 10.0  # 8.4 / 7 = 1.200, 10 / 8.4 = 1.190
    assert nearest(8.3, (7.0, 10.0)) == 7.0


def test_a_failed_item_counts_as_wrong_in_every_figure():
    def answer(one):
        if one.index == 1:
            raise RuntimeError("no")
        return one.text

    work = quiet()
    figures = by_name(TextEvaluator(Set([sample(0, "a b"), sample(1, "c d")])).figures(Echo(answer), work))
    assert (figures["word_recall"].value, figures["exact"].value, figures["cer"].value) == (0.5, 0.5, 0.5)
    assert {figure.failed for figure in figures.values()} == {1}
    assert work.notes == ["echo failed on 1 of 2 images; they count as read empty. The first: RuntimeError: no"]
    assert work.items[1]["error"] == "RuntimeError: no"
    assert work.items[0] == {
        "index": 0,
        "source": "",
        "x_height": 10.0,
        "truth": "a b",
        "prediction": "a b",
        "word_f1": 1.0,
        "cer": 0.0,
    }


def test_texts_of_one_source_are_drawn_together():
    content = [sample(n, "a", source=f"document {n // 10}") for n in range(100)]
    reader = Echo(lambda one: "a" if one.index // 10 % 2 else "b")
    figure = by_name(TextEvaluator(Set(content)).figures(reader, quiet()))["exact"]
    assert figure.value == 0.5
    assert figure.high - figure.low > 0.4  # of ten documents; of a hundred texts it would be 0.2


def test_a_set_without_labels_is_not_measured():
    with pytest.raises(NotMeasured, match="made: none of its 2 items says what stands on it"):
        list(TextEvaluator(Set([sample(0, ""), sample(1, " ")])).figures(Echo(), quiet()))


def test_seconds_are_per_item():
    class Telling(Echo):
        def readings(self, samples):
            return [ReadText(one.text, 1.0 + one.index) for one in samples]

    figures = by_name(TextEvaluator(Set([sample(0, "a"), sample(1, "b")])).figures(Telling(), quiet()))
    assert (figures["seconds_per_item"].value, figures["seconds_per_item"].unit) == (1.5, "s")


# ---------------------------------------------------------------------------------------------------------- Markdown

PAGE = "# Title\n\n- one\n- two"


class Writer(Echo):
    writes_markdown = True


def test_markdown_is_asked_for_in_both_ways_and_measured_in_each():
    reader = Writer(lambda one: PAGE if one.markdown else "Title\none\ntwo")
    work = quiet()
    figures = list(TextEvaluator(Set([sample(0, PAGE)], markdown=True)).figures(reader, work))
    asked, plain = by_name(figures, way="Markdown prompt"), by_name(figures, way="plain text")
    assert (asked["markdown_similarity"].value, asked["list_f1"].value, asked["heading_f1"].value) == (1.0, 1.0, 1.0)
    assert (plain["list_f1"].value, plain["heading_f1"].value) == (0.0, 0.0)
    assert asked["word_f1"].value == plain["word_f1"].value == asked["exact"].value == 1.0  # markup is no text
    assert [item["way"] for item in work.items] == ["Markdown prompt", "plain text"]


def test_markdown_by_layout_comes_with_the_plain_reading():
    class Layouter(Echo):
        lays_out_markdown = True
        asked = 0

        def readings(self, samples):
            self.asked += len(samples)
            return [ReadText("Title one two", 1.0, markdown=PAGE) for _ in samples]

    reader, work = Layouter(), quiet()
    figures = list(TextEvaluator(Set([sample(0, PAGE)], markdown=True)).figures(reader, work))
    laid_out, plain = by_name(figures, way="by layout"), by_name(figures, way="plain text")
    assert (laid_out["markdown_similarity"].value, laid_out["heading_f1"].value) == (1.0, 1.0)
    assert (plain["heading_f1"].value, plain["word_f1"].value) == (0.0, 1.0)
    assert laid_out["exact"].value == 1.0  # markup is no text
    assert reader.asked == 1


def test_a_subject_without_a_prompt_for_markdown_is_measured_by_its_text_with_a_note():
    work = quiet()
    reader = Echo(lambda one: "Title one two" if not one.markdown else pytest.fail("asked for Markdown"))
    figures = list(TextEvaluator(Set([sample(0, PAGE)], markdown=True)).figures(reader, work))
    assert {figure.at["way"] for figure in figures} == {"plain text"}
    assert work.notes == ["echo has no prompt for Markdown: its plain text is measured as it is."]


def test_a_fingerprint_says_what_is_read_and_how_much():
    plain = TextEvaluator(Set([], (7.0,)), 5)
    assert plain.fingerprint() == {"set": {"set": "made"}, "limit": 5, "heights": [7.0]}


def test_evaluators_are_the_sets_that_hold_text(tmp_path):
    found = text_suite.evaluators(Options(sets=("default", f"mine={tmp_path}")))
    names = [one.name for one in found]
    assert {"blocks", "pages", "md-val", "mine"} <= set(names)
    assert "blank" not in names
    assert {one.limit for one in text_suite.evaluators(Options(limit=3))} == {3}


# ----------------------------------------------------------------------------------------------------- ModelSubject


def test_a_model_reads_markdown_whole_and_everything_else_cut(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "unit", "text_config": {"max_position_embeddings": 64}}', encoding="utf-8"
    )
    (tmp_path / "processor_config.json").write_text('{"task_prompts": {"markdown": "md"}}', encoding="utf-8")
    subject = ModelSubject(tmp_path)
    asked = []

    class Ids:
        shape = (1, 24)

    class Page:
        def __init__(self, text):
            self.text, self.seconds, self.blocks = text, 0.25, [Block(True, False), Block(False, False)]

    @dataclass
    class Block:
        repetition_stopped: bool
        truncated: bool

    class Reader:
        def processor(self, images, task, return_tensors):
            asked.append(("prompt", task, len(images)))
            return {"input_ids": Ids()}

        def read_inputs(self, inputs, limits):
            asked.append(("limits", limits))
            return ["# Markdown"]

        def read_many(self, images):
            asked.append(("cut", len(images)))
            return [Page(f"page {n}") for n in range(len(images))]

    subject._reader = Reader()
    samples = [sample(0, ""), sample(1, "", markdown=True), sample(2, "")]
    assert subject.writes_markdown
    found = subject.readings(samples)
    assert [one.text for one in found] == ["page 0", "# Markdown", "page 1"] == subject.read(samples)
    assert found[0].remarks == ("repetition stopped",)
    assert found[0].seconds == 0.25
    assert asked[:3] == [("prompt", "markdown", 1), ("limits", [40]), ("cut", 2)]  # 64 places, 24 of them taken


def test_a_model_without_a_prompt_for_markdown_reads_its_plain_text(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unit"}', encoding="utf-8")
    (tmp_path / "processor_config.json").write_text('{"task_prompts": {"ocr": "read"}}', encoding="utf-8")
    assert not ModelSubject(tmp_path).writes_markdown
