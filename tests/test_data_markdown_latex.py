"""`training.data.markdown_latex`: LaTeX laid against the pages of its PDF.

PDFs are drawn here with skia, so that what stands on them is known; the parser pylatexenc is needed for all of it.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skia

from training.data import markdown_latex
from training.data.markdown import write
from training.data.schema import read_columns

pytest.importorskip("pylatexenc")

FACES = {"r": "DejaVuSans.ttf", "b": "DejaVuSans-Bold.ttf", "i": "DejaVuSans-Oblique.ttf", "t": "DejaVuSansMono.ttf"}


def draw_pdf(path: Path, pages: list[list[tuple[float, list[tuple[str, str]]]]]) -> None:
    """Pages of lines, each its indent and its (face, text) fragments, 14 points one below the other."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {key: skia.Font(skia.Typeface.MakeFromFile(str(folder / name)), 10) for key, name in FACES.items()}
    stream = skia.FILEWStream(str(path))
    document = skia.PDF.MakeDocument(stream)
    for lines in pages:
        with document.page(500, 700) as canvas:
            for number, (indent, fragments) in enumerate(lines):
                x = 40 + indent
                for face, text in fragments:
                    canvas.drawString(text, x, 50 + 14 * number, fonts[face], skia.Paint())
                    x += fonts[face].measureText(text)
    document.close()
    stream.flush()
    del document, stream


FILLER = [
    "The quick brown fox jumps over the lazy dog while seven wizards",
    "boxed many quite jolly lynxes near some old bridge in our village",
    "and nobody ever asked them why they did so before the morning came",
]


def filler() -> list[tuple[float, list[tuple[str, str]]]]:
    return [(0, [("r", line)]) for line in FILLER]


SOURCE = r"""\documentclass{article}
\newcommand{\thing}[1]{\textbf{#1}}
\newcommand{\R}{\mathbf{R}}
\begin{document}
\section{First things} % a comment
""" + " ".join(FILLER) + r"""

See Section~\ref{x} for \emph{slanted words} and \thing{heavy ones}, with $x \in \R$, of \verb|code here|.

\begin{itemize}
\item apples are red
\item pears \textit{are} green
\end{itemize}
\begin{enumerate}
\item first of all
\item second of all
\end{enumerate}
\begin{verbatim}
for i in range(3):
    print(i)
\end{verbatim}
\begin{tabular}{ll}
\hline Name & Value \\ \hline
alpha & 12 \\
beta & 34 \\
\end{tabular}

\section*{Last things}
""" + " ".join(reversed(FILLER)) + r"""
\end{document}
"""  # fmt: skip

PAGE = [
    (150, [("r", "A running head")]),
    (0, [("b", "1 First things")]),
    *filler(),
    (0, [("r", "See Section 3.2 for "), ("i", "slanted words"), ("r", " and "), ("b", "heavy ones"),
         ("r", ", with x ∈ R, of "), ("t", "code here"), ("r", ".")]),
    (10, [("r", "• apples are red")]),
    (10, [("r", "• pears "), ("i", "are"), ("r", " green")]),
    (10, [("r", "1. first of all")]),
    (10, [("r", "2. second of all")]),
    (0, [("t", "for i in range(3):")]),
    (0, [("t", "    print(i)")]),
    (20, [("r", "Name   Value")]),
    (20, [("r", "alpha   12")]),
    (20, [("r", "beta   34")]),
    (0, [("b", "Last things")]),
    *reversed(filler()),
    (200, [("r", "7")]),
]  # fmt: skip

TARGET = "\n\n".join(
    [
        "## 1 First things",
        " ".join(FILLER),
        r"See Section 3.2 for *slanted words* and **heavy ones**, with $x \in \mathbf{R}$, of `code here`.",
        "- apples are red\n- pears *are* green",
        "1. first of all\n2. second of all",
        "```\nfor i in range(3):\n    print(i)\n```",
        "| Name | Value |\n| --- | --- |\n| alpha | 12 |\n| beta | 34 |",
        "## Last things",
        " ".join(reversed(FILLER)),
    ]
)


def pages(tmp_path, source: str, drawn, name: str = "doc", size: int = 896):
    draw_pdf(tmp_path / f"{name}.pdf", drawn)
    (tmp_path / f"{name}.tex").write_text(source)
    reasons = Counter()
    (pair,) = markdown_latex.find_pairs(tmp_path)
    return list(markdown_latex.pages_of_document(*pair, size, 10, reasons)), reasons


def test_a_page_is_written_with_the_structure_of_its_source(tmp_path):
    (page,), reasons = pages(tmp_path, SOURCE, [PAGE])
    assert write(page.blocks) == TARGET
    assert not reasons
    assert max(page.pixels.shape) == 896
    assert page.agreement == 1.0


def test_a_paragraph_over_two_pages_is_written_as_far_as_it_stands_there(tmp_path):
    words = [f"word{number}" for number in range(120)]
    lines = [(0, [("r", " ".join(words[at : at + 6]))]) for at in range(0, 120, 6)]
    source = "\\begin{document}\n" + " ".join(words) + "\n\\end{document}"
    (first, second), _ = pages(tmp_path, source, [lines[:10], lines[10:]])
    assert write(first.blocks) == " ".join(words[:60])
    assert write(second.blocks) == " ".join(words[60:])


def test_the_rest_of_an_item_has_no_mark(tmp_path):
    words = [f"word{number}" for number in range(60)]
    lines = [" ".join(words[at : at + 6]) for at in range(0, 60, 6)]
    source = (
        "\\begin{document}\n" + " ".join(FILLER) + "\n\\begin{itemize}\\item " + " ".join(words)
        + "\\item another one\\end{itemize}\n" + " ".join(FILLER) + "\n\\end{document}"
    )  # fmt: skip
    marked = [(0, [("r", ("• " if index == 0 else "") + line)]) for index, line in enumerate(lines)]
    drawn = [[*filler(), *marked[:5]], [*marked[5:], (0, [("r", "• another one")]), *filler()]]
    (first, second), _ = pages(tmp_path, source, drawn)
    assert write(first.blocks) == " ".join(FILLER) + "\n\n- " + " ".join(words[:30])
    assert write(second.blocks) == " ".join(words[30:]) + "\n\n- another one\n\n" + " ".join(FILLER)


def test_a_numbered_formula_has_its_number(tmp_path):
    source = "\\begin{document}\n" + " ".join(FILLER) + (
        "\n\\begin{equation}\\label{e} a = b + c \\end{equation}\nand so on.\n"
    ) + " ".join(reversed(FILLER)) + "\\end{document}"  # fmt: skip
    drawn = [*filler(), (100, [("r", "a = b + c      (4)")]), (0, [("r", "and so on.")]), *reversed(filler())]
    (page,), _ = pages(tmp_path, source, [drawn])
    assert write(page.blocks).split("\n\n")[1] == r"$$a = b + c \tag{4}$$"


def body(inner: str) -> str:
    return "\\begin{document}\n" + " ".join(FILLER) + f"\n\n{inner}\n\n" + " ".join(FILLER) + "\n\\end{document}"


REFUSED = [
    ("nothing of the kind", "Another text stands upon this page instead of what the source says here, " * 2,
     "page: source and page disagree"),
    ("Here\\footnote{below} it is", "Here it is", "page: footnote"),
    (r"\Tree [.S a b ]", "S a b", "page: a drawing in the text"),
    (r"\begin{tabular}{ll}\multicolumn{2}{c}{both}\\ one & two\end{tabular}", "both one two",
     "page: a table with spanning or nested cells"),
    ("redefinitions of prefixes are finetuned", "redenitions of prexes are netuned", "page: text layer"),
]  # fmt: skip


@pytest.mark.parametrize(("inner", "printed", "reason"), REFUSED)
def test_a_page_that_is_not_its_source_is_refused(inner, printed, reason, tmp_path):
    lines = [(0, [("r", printed[at : at + 70])]) for at in range(0, len(printed), 70)]
    found, reasons = pages(tmp_path, body(inner), [[*filler(), *lines, *filler()]])
    assert found == []
    assert list(reasons) == [reason]


def test_small_type_is_refused(tmp_path):
    found, reasons = pages(tmp_path, SOURCE, [PAGE], size=200)
    assert found == []
    assert list(reasons) == ["page: type too small at this size"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("plain \\TeX", "source: no document environment"),
        ("\\begin{document}" + "\\begin{a}{" * 300 + "\\end{document}", "source: LaTeX that cannot be parsed"),
    ],
)
def test_sources_that_cannot_be_read_are_refused_in_time(source, reason, tmp_path):
    found, reasons = pages(tmp_path, source, [PAGE])
    assert found == []
    assert next(iter(reasons)) in (reason, "source: nested too deeply", "page: little text of the source")


def test_mutated_sources_are_read_or_refused():
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for _ in range(300):
        characters = list(SOURCE)
        for at in rng.integers(60, len(SOURCE), size=3):
            length = int(rng.integers(1, 12))
            characters[at : at + length] = rng.choice(list("\\{}[]$&%#\n a"), size=int(rng.integers(0, 4))).tolist()
        try:
            markdown_latex.read_source("".join(characters))
            outcomes["read"] += 1
        except ValueError as reason:
            outcomes[str(reason).split(":")[0]] += 1
    assert set(outcomes) <= {"read", "source"}
    assert outcomes["read"] > 100


def test_damaged_files_are_skipped_with_a_reason(tmp_path):
    (tmp_path / "doc.pdf").write_bytes(b"%PDF-1.5 nothing")
    (tmp_path / "doc.tex").write_text(SOURCE)
    reasons = Counter()
    (pair,) = markdown_latex.find_pairs(tmp_path)
    assert list(markdown_latex.pages_of_document(*pair, 896, 10, reasons)) == []
    assert list(reasons) == ["document: cannot be opened"]
    draw_pdf(tmp_path / "doc.pdf", [PAGE])
    (tmp_path / "doc.tex").unlink()
    (tmp_path / "doc.tex.gz").write_bytes(gzip.compress(SOURCE.encode())[:-40])
    (pair,) = markdown_latex.find_pairs(tmp_path)
    reasons.clear()
    assert list(markdown_latex.pages_of_document(*pair, 896, 10, reasons)) == []
    assert list(reasons) == ["source: cannot be read"]


def test_a_package_becomes_a_data_set(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    tree = tmp_path / "trees" / "some-doc"
    tree.mkdir(parents=True)
    draw_pdf(tree / "a.pdf", [PAGE])
    (tree / "a.tex.gz").write_bytes(gzip.compress(SOURCE.encode()))
    (tree / "lonely.pdf").write_bytes((tree / "a.pdf").read_bytes())
    for workers in (1, 2):
        report = markdown_latex.build_latex_pages(
            ["some-doc"], tmp_path / f"out{workers}", workers=workers, progress=False
        )
        assert report.rows == 1
    columns = ["image", "text", "task", "source", "split"]
    (row,), (other,) = (list(read_columns(tmp_path / f"out{workers}", columns)) for workers in (1, 2))
    assert row == other
    assert (row["text"], row["task"], row["source"]) == (TARGET, "markdown", "some-doc/a.pdf#1")
    assert json.loads((tmp_path / "out1" / "report.json").read_text())["settings"]["packages"] == ["some-doc"]
    report = markdown_latex.build_latex_pages(
        ["some-doc"], tmp_path / "none", unwanted=lambda text: True, progress=False
    )
    assert report.refusals["page: shares text with held-out documents"] == 1


def test_a_document_that_crashes_the_reader_is_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path))
    tree = tmp_path / "trees" / "some-doc"
    tree.mkdir(parents=True)
    for name in ("a", "b"):
        draw_pdf(tree / f"{name}.pdf", [PAGE])
        (tree / f"{name}.tex").write_text(SOURCE)
    read = markdown_latex.pages_of_document

    def read_or_die(pdf, *rest):
        return os.kill(os.getpid(), signal.SIGKILL) if pdf.name == "a.pdf" else read(pdf, *rest)

    monkeypatch.setattr(markdown_latex, "pages_of_document", read_or_die)
    report = markdown_latex.build_latex_pages(["some-doc"], tmp_path / "out", progress=False)
    assert report.rows == 1
    assert report.refusals == {"document: crashes the reader": 1}
