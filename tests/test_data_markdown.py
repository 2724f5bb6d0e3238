"""`training.data.markdown`, `markdown_typeset`, `markdown_pages`: the dialect, pages set in it, data sets of pages.

Offline: Markdown written here, the DejaVu fonts that matplotlib carries.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import heldout, markdown_pages
from training.data.markdown import (
    Code,
    Formula,
    Heading,
    Items,
    Paragraph,
    Quote,
    Rule,
    Run,
    Table,
    parse,
    visible_text,
    write,
)
from training.data.markdown_typeset import assemble, draw, draw_style, find_families, lay_out, paginate, set_formula
from training.data.refusals import TooManyRefused
from training.data.schema import read_columns, shard_paths, validate_row


def text(*words: str) -> tuple[Run, ...]:
    return (Run(" ".join(words)),)


@pytest.fixture(scope="session")
def fonts() -> dict[str, list[str]]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {
        "DejaVu Sans": [str(folder / f"DejaVuSans{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
        "DejaVu Serif": [str(folder / f"DejaVuSerif{style}.ttf") for style in ("", "-Bold", "-Italic")],
        "DejaVu Sans Mono": [str(folder / f"DejaVuSansMono{style}.ttf") for style in ("", "-Bold")],
    }


@pytest.fixture
def style(fonts):
    drawn = draw_style(np.random.default_rng(1), find_families(fonts), 640)
    return replace(drawn, width=640, columns=1, size=11.0, margins=(30.0, 30.0, 30.0, 30.0))


# ------------------------------------------------------------------------------------------------------ the dialect

DIALECT = [
    ("Title\n=====\n\n### Third ###", "# Title\n\n### Third"),
    ("two\nlines and\\\na break  \nhere", "two lines and a break here"),
    ("__bold__ _it_ ***both*** ~~gone~~ `co  de`", "**bold** *it* ***both*** ~~gone~~ `co de`"),
    ("**a** **b** and `c` `d`", "**a b** and `c d`"),
    ("[text](http://x 'title') ![alt](pic.png) <https://a.b>", "text https://a.b"),
    ("* a\n* b\n\n    more\n  - c\n\n+ d", "- a\n- b\n\n  more\n  - c\n- d"),
    ("7) a\n8) b", "7. a\n8. b"),
    ("```python\nx\t= 1  \n```\n\n    y", "```\nx   = 1\n```\n\n```\ny\n```"),
    ("> a\nb\n> > c", "> a b\n>\n> > c"),
    ("|a|b|\n|:-|-:|\n|1|`x\\|y`|", "| a | b |\n| --- | --- |\n| 1 | `x\\|y` |"),
    ("***\n\ntext", "---\n\ntext"),
    ("a <!-- hidden --> b <b>c</b>\n\n<div>\nblock\n</div>\n\n<!-- x -->", "a b c"),
    ("$x^2$ and ($y$).", "$x^2$ and ($y$)."),
    ("$$\n\\frac{1}\n{2}\n$$\n\n```math\ny\n```", "$$\\frac{1} {2}$$\n\n$$y$$"),
    ("It costs $5 or $HOME:$PATH", "It costs \\$5 or \\$HOME:\\$PATH"),
    ("“quoted” – it’s… ﬁne &amp; 🎉 done", '"quoted" - it\'s... fine & done'),
    ("---\ntitle: x\n---\ntext", "text"),
    ("1\\. no list, \\# no heading, 2 * 3, _a, b_c", "1\\. no list, # no heading, 2 \\* 3, \\_a, b_c"),
    ("\\- no list\n\n\\# no heading\n\n\\> no quote", "\\- no list\n\n\\# no heading\n\n\\> no quote"),
]


@pytest.mark.parametrize(("foreign", "dialect"), DIALECT)
def test_markdown_is_normalised_to_the_dialect(foreign, dialect):
    assert write(parse(foreign, foreign=True)) == dialect


@pytest.mark.parametrize(("_", "dialect"), DIALECT)
def test_reading_what_was_written_gives_the_same_blocks(_, dialect):
    blocks = parse(dialect)
    assert parse(write(blocks)) == blocks


HARD = ["*", "a*b", "_x_", "`tick`", "$5$", "<b>", "&amp;", "[a](b)", "[a]: b", "# h", "- i", "+ i", "1. i", "2) i",
        "> q", "---", "===", "~~~", "~~x~~", "a|b", "\\", "\\*", "![i](j)", "#", "snake_case",
        "https://a.b/c_d_"]  # fmt: skip


@pytest.mark.parametrize("hard", HARD)
def test_literal_text_survives_in_every_place(hard):
    runs = (Run(f"{hard} and {hard}"),)
    if "`" in hard:
        runs = (Run(runs[0].text.replace("`", "'")),)  # the one spelling of text has no backtick
    blocks = (
        Paragraph(runs),
        Heading(2, runs),
        Quote((Paragraph(runs),)),
        Items(True, 3, ((Paragraph(runs), Items(False, 0, ((Paragraph(runs),),))),)),
        Table((runs, text("b")), ((text("a"), runs),)),
    )
    for block in blocks:
        assert parse(write([block])) == (block,)


def test_emphasis_that_commonmark_cannot_write_is_left_out():
    assert parse('a<b>x</b>**"b"**c', foreign=True)[0].runs[0].bold is False
    blocks = parse("x**_y_**z *a*b", foreign=True)
    assert parse(write(blocks)) == blocks


def test_left_out_blocks_are_counted_with_a_reason():
    reasons = Counter()
    parse("![](a.png)\n\n<div>words</div>\n\n<!-- no -->\n\nkept", foreign=True, skipped=lambda r: reasons.update([r]))
    assert reasons == {"block: no words": 1, "block: HTML": 1}


# ------------------------------------------------------------------------------------------------------ typesetting

EVERYTHING = (
    Heading(1, text("All of it")),
    Paragraph((Run("Some "), Run("bold", bold=True), Run(" and "), Run("x = 1", code=True),
               Run(", "), Run(r"\frac{a}{b}", math=True), Run(" end."))),
    Heading(3, text("A list")),
    Items(False, 0, ((Paragraph(text("one")),
                      Items(True, 4, ((Paragraph(text("four")),), (Paragraph(text("five")),)))),
                     (Paragraph(text("two")),))),
    Quote((Paragraph(text("said someone")), Code(("quoted()",)))),
    Code(("def f(x):", "", "    return x")),
    Formula(r"\sum_{i=0}^n x_i = \sqrt{\alpha}"),
    Table((text("a"), text("b")), ((text("1"), ()), (text("3"), text("4")))),
    Rule(),
)  # fmt: skip


def test_a_page_holds_every_construct_and_its_target_says_so(style):
    (page,) = paginate(lay_out(EVERYTHING, style), style)
    assert page.blocks() == EVERYTHING
    assert parse(write(page.blocks())) == EVERYTHING


def test_words_of_a_page_are_those_of_its_text_and_their_boxes_hold_the_ink(style):
    line = (Run("plain "), Run("code", code=True), Run(", "), Run("x^2", math=True))
    line = (Run("plain "), Run("code", code=True), Run(", "), Run("x^2", math=True))
    blocks = (Heading(2, text("Big", "words")), Paragraph(line))
    (page,) = paginate(lay_out(blocks, style), style)
    pixels, words = draw(page)
    assert [word["text"] for word in words] == ["Big", "words", "plain", "code,", "$x^2$"]
    ink = pixels < 250
    for word in words:
        x0, y0, x1, y1 = word["box"]
        assert ink[y0:y1, x0:x1].any()
        ink[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
    assert not ink.any()  # nothing was drawn outside of the boxes


def test_pagination_loses_nothing_and_repeats_only_table_headers(style):
    sentence = [f"word{number}" for number in range(700)]
    rows = tuple((text(f"cell{number}"), text("x")) for number in range(60))
    lines = tuple(f"line{number}" for number in range(60))
    items = tuple((Paragraph(text(f"item{number}")),) for number in range(60))
    blocks = (Paragraph(text(*sentence)), Items(True, 1, items), Table((text("H"), text("K")), rows), Code(lines))
    pages = paginate(lay_out(blocks, style), style)
    assert len(pages) > 3
    shown = " ".join(visible_text(page.blocks()) for page in pages).split()
    headers = [word for word in shown if word in "HK"]
    assert len(headers) >= 4  # the table is divided
    assert len(headers) % 2 == 0
    expected = visible_text(blocks).split()
    assert [word for word in shown if word not in "HK"] == [word for word in expected if word not in "HK"]
    # Numbers go on where the list was divided.
    for page in pages:
        for block in page.blocks():
            if isinstance(block, Items):
                assert plain_of(block.items[0]) == f"item{block.start - 1}"
        assert parse(write(page.blocks())) == page.blocks()


def plain_of(item) -> str:
    return visible_text(item)


def test_two_columns_show_a_paragraph_as_one_and_code_as_two(style):
    narrow = replace(style, columns=2, gap=20.0, height=200)
    blocks = (Paragraph(text(*["word"] * 90)), Code(tuple(f"line {number}" for number in range(14))))
    (page, *_) = paginate(lay_out(blocks, narrow), narrow)
    assert {column for _, _, column, _ in page.placed} == {0, 1}
    kinds = [type(block) for block in page.blocks()]
    assert kinds.count(Paragraph) == 1
    parts = [(0, (0,), Code(("a", ""))), (1, (0,), Code(("b",)))]
    assert assemble(parts) == (Code(("a",)), Code(("b",)))


def test_a_heading_stays_with_what_follows(style):
    low = replace(style, height=160)
    blocks = [Paragraph(text(*["word"] * 40))]
    for _ in range(4):
        blocks += [Heading(1, text("Heading")), Paragraph(text(*["word"] * 40))]
    for page in paginate(lay_out(blocks, low), low):
        assert not isinstance(page.blocks()[-1], Heading)


UNFIT = [
    (Code(("x" * 400,)), "block: code wider than the column"),
    (Paragraph(text("w" * 400)), "block: a word wider than the column"),
    (Paragraph(text("漢字")), "block: characters that the font lacks"),
    (Formula(r"\begin{cases} a \end{cases}"), "formula: beyond mathtext"),
    (Table(tuple(text("w" * 30) for _ in range(20)), ()), "block: table wider than the column"),
    (Items(False, 0, (tuple(Paragraph(text("x")) for _ in range(99)),)), "block: taller than the page"),
]


@pytest.mark.parametrize(("block", "reason"), UNFIT)
def test_what_cannot_be_set_is_left_out_with_its_reason(block, reason, style):
    reasons = []
    strips = lay_out([Paragraph(text("before")), block, Paragraph(text("after"))], style, reasons.append)
    assert reasons == [reason]
    (page,) = paginate(strips, style)
    assert page.blocks() == (Paragraph(text("before")), Paragraph(text("after")))


def test_formulas_are_set_to_their_size():
    small, wide = set_formula("x", "cm"), set_formula("x + x + x", "cm")
    assert wide.width > 3 * small.width
    assert set_formula(r"\frac{x}{y}", "cm").ascent > small.ascent
    within, alone = set_formula(r"\frac{x}{y}", "cm"), set_formula(r"\frac{x}{y}", "cm", display=True)
    assert alone.ascent + alone.descent > 1.2 * (within.ascent + within.descent)
    assert set_formula(r"\notacommand", "cm") is None


# ------------------------------------------------------------------------------------------------------- data sets

PROSE = "\n\n".join(
    f"## Part {number}\n\n" + " ".join(f"sentence {number} has some words in it." for _ in range(12))
    for number in range(6)
)


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "notes"
    source.mkdir()
    (source / "a.md").write_text(PROSE)
    (source / "b.md").write_text(
        "# Table\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n" + PROSE.replace("sentence", "phrase")
    )
    return source


def build(folder, out, fonts, count=6, **wishes):
    documents = markdown_pages.find_documents([str(folder)], license="CC0-1.0")
    return markdown_pages.build_pages(documents, out, count, fonts=fonts, size=448, progress=False, **wishes)


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in shard_paths(folder)]


def test_same_seed_gives_the_same_bytes_whatever_the_workers(folder, fonts, tmp_path):
    build(folder, tmp_path / "one", fonts, seed=5)
    build(folder, tmp_path / "two", fonts, seed=5, workers=2)
    build(folder, tmp_path / "other", fonts, seed=6)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")


def test_rows_are_of_the_schema_and_the_report_counts_them(folder, fonts, tmp_path):
    report = build(folder, tmp_path / "out", fonts, count=5)
    columns = ["image", "text", "task", "kind", "words", "x_height", "source", "license", "split"]
    rows = list(read_columns(tmp_path / "out", columns))
    assert len(rows) == report.rows == 5
    for row in rows:
        validate_row({**row, "char_boxes": []})
        assert (row["task"], row["kind"], row["license"], row["split"]) == ("markdown", "document", "CC0-1.0", "train")
        assert max(Image.open(io.BytesIO(row["image"]["bytes"])).size) == 448
        assert row["source"].startswith("made-markdown/notes/")
        assert write(parse(row["text"])) == row["text"]
        seen = visible_text(parse(row["text"])).split()
        assert Counter(word["text"] for word in row["words"]) == Counter(seen)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == 5


def test_bad_files_are_skipped_with_a_reason(folder, fonts, tmp_path):
    (folder / "latin.md").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (folder / "short.md").write_text("hello")
    (folder / "other.md").write_text("漢字" * 200 + " some words of English" * 20)
    report = build(folder, tmp_path / "out", fonts, count=20)
    assert report.rows == 20
    assert {"file: not UTF-8", "file: little text", "file: not in Latin letters"} <= set(report.refusals)


def test_a_source_of_damaged_files_stops_the_run(folder, fonts, tmp_path):
    for number in range(30):
        (folder / f"{number}.md").write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(TooManyRefused, match="not UTF-8"):
        build(folder, tmp_path / "out", fonts, count=2000)
    assert not (tmp_path / "out").exists()


def test_a_file_that_crashes_the_reader_costs_itself_alone(folder, fonts, tmp_path, monkeypatch):
    (folder / "bomb.md").write_text(PROSE)
    read = markdown_pages.read_document

    def read_or_die(path):
        return os.kill(os.getpid(), signal.SIGKILL) if path.endswith("bomb.md") else read(path)

    monkeypatch.setattr(markdown_pages, "read_document", read_or_die)
    report = build(folder, tmp_path / "out", fonts, count=12)
    assert report.rows == 12
    assert report.refusals["file: crashes the reader"] > 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["damaged"]["Markdown files"]
    example = told["reasons"]["file: crashes the reader"]["examples"][0]
    assert example.startswith("notes/bomb.md: ended its process twice (SIGKILL)")


def test_unwanted_text_is_on_no_page(folder, fonts, tmp_path):
    report = build(folder, tmp_path / "out", fonts, count=8, unwanted=lambda text: "sentence 3" in text)
    assert report.refusals["block: shares text with held-out documents"] > 0
    assert not any("sentence 3" in row["text"] for row in read_columns(tmp_path / "out", ["text"]))


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder or file"):
        markdown_pages.find_documents([str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"no \.md file"):
        markdown_pages.find_documents([str(tmp_path)])


def package(cache: Path, name: str, license: str) -> None:
    tree = cache / "npm" / name
    tree.mkdir(parents=True)
    (tree / "package.json").write_text(json.dumps({"name": name, "license": license}))
    (tree / "README.md").write_text(PROSE)


def test_held_out_packages_are_for_validation_only(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    package(tmp_path, "fastify@1.0.0", "MIT")
    package(tmp_path, "something", "MIT")
    with pytest.raises(ValueError, match="held out"):
        markdown_pages.find_documents(["npm:fastify@1.0.0"], "train")
    with pytest.raises(ValueError, match="not one of the held-out"):
        markdown_pages.find_documents(["npm:something"], "validation")
    (document,) = markdown_pages.find_documents(["npm:fastify@1.0.0"], "validation")
    assert (document.name, document.license) == ("npm/fastify@1.0.0/README.md", "MIT")


def test_only_permissive_licences_are_kept_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    package(tmp_path, "free", "ISC")
    package(tmp_path, "strict", "GPL-3.0-only")
    said = []
    found = markdown_pages.find_documents(["npm:free", "npm:strict"], skipped=said.append)
    assert [document.license for document in found] == ["ISC"]
    assert "strict" in said[0]
    both = markdown_pages.find_documents(["npm:free", "npm:strict"], any_license=True)
    assert [document.license for document in both] == ["ISC", "GPL-3.0-only"]


def test_no_default_package_of_one_split_is_of_the_other():
    train = markdown_pages.default_packages("train")
    assert not any(heldout.is_heldout_markdown(name) for name in train)
    assert all(heldout.is_heldout_markdown(name) for name in markdown_pages.default_packages("validation"))
    assert heldout.is_heldout_markdown("fastify")
    assert heldout.is_heldout_markdown("fastify@99.0.0")
    assert not heldout.is_heldout_markdown("@stdlib/math@0.3.3")
