"""Pages of real PDFs whose target is Markdown, where the LaTeX source lies beside the PDF: as Nougat's data was made.

The source says what the parts of a page are, the page's text layer says what stands in them:

1. `read_source`: LaTeX to an outline (headings, paragraphs, lists, tables, verbatim, formulas) with its words.
2. `read_page`: characters of a page with their looks (bold, italic, typewriter, from the names of the fonts).
3. The words of the whole document, source against pages, are aligned by their longest common subsequence.
4. `Aligned.blocks`: the outline's parts on a page, in the page's own characters, so that numbers of sections,
   references, citations and whatever macros print are as printed. Formulas and verbatim text come from the source.

The subset of LaTeX: sectioning, ``\\title`` and ``\\author``, paragraphs, ``itemize``, ``enumerate``,
``description``, ``quote``, ``tabular`` without spanning cells, ``verbatim`` and its kin, captions, ``$…$`` and
displayed mathematics, macros by ``\\newcommand`` and ``\\def`` with plain arguments. Other environments count as
their content, other macros as the groups behind them, pictures as nothing: where a page shows something else its words
do not agree, and it is refused.

How a page is written: ``\\title``, ``\\part`` and ``\\chapter`` are ``#``, ``\\section`` is ``##`` and so on, with
their printed numbers; an item of a description begins with its term as printed; an item whose label is no plain number
is ``- `` and the label; a displayed formula has ``\\tag{…}`` with its printed number; captions, and short lines that a
class prints by itself (a date, "Abstract"), are paragraphs; running heads and page numbers are not written. A
paragraph or list divided by a page break is written as far as it stands there, the rest of an item whose mark is on
the page before as paragraphs.

A page is kept when of its words, running heads and formulas aside, and of those that the source has for it, at least
`LEAST_AGREEMENT` agree, when the target's characters are to at least `LEAST_LIKENESS` the page's, and when nothing on
it is beyond the dialect (footnotes, spanning cells, several numbers at one formula). Every number is ours.
"""

from __future__ import annotations

import bisect
import ctypes
import gzip
import math
import re
import textwrap
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from . import markdown
from .guarded import Failure, run_guarded, why
from .markdown import Block, Code, Formula, Heading, Items, Paragraph, Quote, Run, Runs, Table
from .pdf import PAGE_LICENSE, SOFT_HYPHENS, X_HEIGHT_LETTERS, Report
from .refusals import Refusals
from .schema import make_row, write_shards
from .sources import fetch_deb
from .text import normalize_character, normalize_text

LEAST_AGREEMENT = 0.95
LEAST_LIKENESS = 0.94
LEAST_WORDS = 40  # of a page's target
MOST_WORDS = 30_000  # of a document: the alignment takes memory with the square
MOST_BYTES = 600_000  # of a source: longer ones have too many words to be aligned
DOCUMENT_SECONDS = 120.0  # of a document, some ten times what the slowest that is of use takes: a guard, not a sieve
MOST_PRINTED = 12  # words between two parts that the source has not
MOST_FURNITURE = 14  # words of running heads and feet, each
_WORD = re.compile(r"[^\W_]+")

# ---------------------------------------------------------------------------------------------------------- outline


@dataclass
class Word:
    """Some words of the source, ``first`` to ``last - 1`` of the document."""

    first: int
    last: int


@dataclass
class Math:
    """A formula in a line; ``before`` and ``after`` are the punctuation that touches it, with a space or without."""

    latex: str
    at: int  # words of the source before it
    before: str = ""
    after: str = ""


@dataclass
class Hole:
    """Something printed that the source does not spell: a reference, a citation."""

    at: int


@dataclass
class Bad:
    """Something that spoils its page; ``reason`` is counted."""

    reason: str
    at: int


Atom = Word | Math | Hole | Bad


@dataclass
class Flow:
    atoms: list[Atom]
    level: int = 0  # of a heading; 0 for a paragraph
    label: str = ""  # what may be printed before its first word: "number", "caption", or "" for nothing


@dataclass
class Verbatim:
    lines: list[tuple[str, int, int]]  # text, first and last word


@dataclass
class Display:
    latex: str
    at: int
    numbered: bool


@dataclass
class Listing:
    kind: str  # itemize, enumerate, description
    items: list[list[Part]]


@dataclass
class Grid:
    rows: list[list[list[Atom]]]


@dataclass
class Quotation:
    parts: list[Part]


Part = Flow | Verbatim | Display | Listing | Grid | Quotation | Bad

SECTIONS = {"part": 1, "chapter": 1, "section": 2, "subsection": 3, "subsubsection": 4}
RUN_IN = frozenset(("paragraph", "subparagraph"))
MATH = frozenset(
    (
        "equation",
        "align",
        "gather",
        "multline",
        "eqnarray",
        "displaymath",
        "math",
        "flalign",
        "alignat",
        "dmath",
    )
)
SKIPPED = frozenset(
    (
        "tikzpicture",
        "picture",
        "pspicture",
        "comment",
        "tikzcd",
        "forest",
        "asy",
        "filecontents",
        "thebibliography",
        "pgfpicture",
        "circuitikz",
        "psgraph",
        "overpic",
        "feynmandiagram",
        "CD",
        "xy",
        "animateinline",
    )
)
VERBATIM = "verbatim Verbatim lstlisting minted alltt BVerbatim LVerbatim SaveVerbatim listing code verbatimtab"
TABULAR = frozenset(["tabular", "tabularx", "tabulary", "longtable", "array", "supertabular"])
HOLES = frozenset(
    (
        "ref",
        "eqref",
        "pageref",
        "autoref",
        "cref",
        "Cref",
        "vref",
        "nameref",
        "cite",
        "citep",
        "citet",
        "citealp",
        "citeauthor",
        "citeyear",
        "parencite",
        "textcite",
        "autocite",
        "footcite",
        "today",
        "the",
        "thepage",
        "arabic",
        "roman",
    )
)
DRAWINGS = frozenset(("Tree", "qtree", "xymatrix", "xy", "chemfig", "tikz", "psframe", "diagram", "jtree"))
# Formulas that are one character of the text layer.
SIGNS = frozenset((r"\backslash", r"\{", r"\}", "<", ">", "|", "-", "*", r"\langle", r"\rangle", r"\bullet", r"\cdot"))
INVISIBLE = {  # macros with arguments that print nothing -> their arguments, as pylatexenc writes them
    "label": "{", "index": "{", "vspace": "*{", "hspace": "*{", "vskip": "", "input": "{", "include": "{",
    "bibliography": "{", "bibliographystyle": "{", "usepackage": "[{", "setlength": "{{", "addtolength": "{{",
    "setcounter": "{{", "addtocounter": "{{", "pagestyle": "{", "thispagestyle": "{", "includegraphics": "*[[{",
    "hypersetup": "{", "definecolor": "{{{", "color": "[{", "pagenumbering": "{", "lstset": "{", "cline": "{",
    "markboth": "{{", "markright": "{", "hypertarget": "{", "phantomsection": "", "addcontentsline": "{{{",
    "newcommand": "*{[[{", "renewcommand": "*{[[{", "providecommand": "*{[[{", "newenvironment": "*{[[{{",
    "renewenvironment": "*{[[{{", "newtheorem": "*{[{[", "newlength": "{", "newcounter": "{[", "fontsize": "{{",
    "selectlanguage": "{", "enlargethispage": "*{", "linespread": "{", "rule": "[{{", "cmidrule": "[{",
    "bibitem": "[{",
       "graphicspath": "{", "tikzset": "{", "pgfplotsset": "{", "DeclareMathOperator": "*{{", "geometry": "{",
    "marginpar": "[{", "sisetup": "{", "phantom": "{", "hphantom": "{", "vphantom": "{", "pgfkeys": "{",
}  # fmt: skip
FIRST_ARGUMENT_HIDDEN = {"href": "{{", "textcolor": "[{{", "hyperref": "[{", "hyperlink": "{{", "colorbox": "{{",
                         "parbox": "[[[{{", "makebox": "[[{", "framebox": "[[{", "raisebox": "{[[{", "scalebox": "{[{",
                         "resizebox": "{{{"}  # fmt: skip


@dataclass
class Source:
    parts: list[Part]
    words: list[str]


class _Lines:
    """Verbatim texts taken out of the source, in its order, before LaTeX is parsed."""

    def __init__(self):
        self.texts: list[str] = []

    def take(self, source: str) -> str:
        names = "|".join(VERBATIM.split())
        pattern = re.compile(
            rf"\\begin\{{({names})(\*?)\}}(.*?)\\end\{{\1\2\}}"
            r"|\\(?:verb|lstinline)(?![A-Za-z])\*?(?:\[[^\]]*\])?([^\sA-Za-z*{])(.*?)\4"
            r"|(?<!\\)((?:\\\\)*)%[^\n]*(?:\n[ \t]*)?",
            re.DOTALL,
        )
        return pattern.sub(self._one, source)

    def _one(self, match: re.Match) -> str:
        if match[1]:
            first, _, rest = match[3].partition("\n")  # the rest of \begin's line holds options
            self.texts.append(rest if match[1] != "minted" or rest else first)
            return f"\\unitverbatim{{{len(self.texts) - 1}}}"
        if match[4]:
            if "\n" in match[5]:
                return match[0]
            self.texts.append(match[5])
            return f"\\unitverb{{{len(self.texts) - 1}}}"
        return match[6] or ""


def _user_macros(source: str) -> dict[str, tuple[int, str | None, str]]:
    """Macros that ``source`` defines: name -> (arguments, default of the first when optional, body)."""
    found = {}
    pattern = re.compile(
        r"\\(?:(?:re)?newcommand|providecommand|DeclareRobustCommand)\*?\s*\{?\s*\\([A-Za-z]+)\s*\}?\s*"
        r"(?:\[(\d)\])?\s*(?:\[([^\]]*)\])?\s*(?=\{)|\\(?:g|e|x)?def\s*\\([A-Za-z]+)((?:#\d)*)\s*(?=\{)"
    )
    for match in pattern.finditer(source):
        body = _group(source, match.end())
        if body is None:
            continue
        if match[1]:
            found[match[1]] = (int(match[2] or 0), match[3], body)
        else:
            found[match[4]] = (len(match[5]) // 2, None, body)
    return found


def _group(source: str, start: int) -> str | None:
    """The content of the group whose brace opens at ``start``."""
    depth, at = 0, start
    while at < len(source):
        if source[at] == "\\":
            at += 1
        elif source[at] == "{":
            depth += 1
        elif source[at] == "}":
            depth -= 1
            if depth == 0:
                return source[start + 1 : at]
        at += 1
    return None


def read_source(latex: str) -> Source:
    """LaTeX to its outline and words.

    Raises:
        ValueError: there is no document in it, or it cannot be parsed.
    """
    lines = _Lines()
    latex = lines.take(latex.replace("\r\n", "\n"))
    start = latex.find("\\begin{document}")
    end = latex.rfind("\\end{document}")
    if start < 0:
        raise ValueError("source: no document environment")
    preamble, body = latex[:start], latex[start + 16 : end if end > start else None]
    try:
        return _Outline(lines.texts, _user_macros(latex)).read(preamble, body)
    except RecursionError:
        raise ValueError("source: nested too deeply") from None
    except (AttributeError, IndexError, TypeError):  # nodes that lack the arguments they should have
        raise ValueError("source: LaTeX that cannot be parsed") from None


@lru_cache(maxsize=1)
def _bounded_walker():
    """pylatexenc's walker with an end to its patience. Where environments do not close it reads on and goes back, in
    time exponential in their depth."""
    from pylatexenc.latexwalker import LatexWalker

    class BoundedWalker(LatexWalker):
        tokens = 0

        def get_token(self, *args, **kwargs):
            self.tokens += 1
            if self.tokens > 6 * len(self.s) + 1000:  # a document that is well-formed takes one a character at most
                raise _Endless("source: LaTeX that cannot be parsed")
            return super().get_token(*args, **kwargs)

    return BoundedWalker


class _Endless(ValueError):
    """Parsing would take for ever."""


class _Outline:
    """Walks the nodes of pylatexenc, gathering parts and words."""

    def __init__(self, verbatim: list[str], macros: dict[str, tuple[int, str | None, str]]):
        from pylatexenc.latexwalker import get_default_latex_context_db
        from pylatexenc.macrospec import MacroSpec

        # What the outline gives a meaning to is not to be expanded.
        kept = {
            *SECTIONS,
            *RUN_IN,
            *INVISIBLE,
            *HOLES,
            *DRAWINGS,
            "item",
            "title",
            "author",
            "maketitle",
            "footnote",
            "caption",
        }
        self.macros = {name: value for name, value in macros.items() if name not in kept}
        self.verbatim = verbatim
        self.words: list[str] = []
        self.expansions = 0
        specs = [MacroSpec(name, arguments) for name, arguments in {**INVISIBLE, **FIRST_ARGUMENT_HIDDEN}.items()]
        specs += [MacroSpec(name, "*[{") for name in (*SECTIONS, *RUN_IN, "caption")]
        specs += [MacroSpec(name, "{") for name in ("unitverbatim", "unitverb")]
        specs += [MacroSpec(name, "*[[{") for name in HOLES if name not in ("today", "thepage", "the")]
        for name, (count, default, _) in self.macros.items():
            specs.append(MacroSpec(name, "{" * count if default is None else "[" + "{" * (count - 1)))
        self.context = get_default_latex_context_db()
        self.context.add_context_category("unit", macros=specs, prepend=True)
        self.title: dict[str, list] = {}
        self.stack: list[list[Part]] = [[]]
        self.flow: Flow | None = None

    def read(self, preamble: str, body: str) -> Source:
        for name in ("title", "author", "date"):
            if found := list(re.finditer(rf"\\{name}\s*(?:\[[^\]]*\])?\s*(?=\{{)", preamble + body)):
                self.title[name] = self.nodes(_group(preamble + body, found[-1].end()) or "")
        self.walk(self.nodes(body))
        self.end_flow()
        return Source(self.stack[0], self.words)

    def nodes(self, latex: str) -> list:
        from pylatexenc.latexwalker import LatexWalkerError

        try:
            walker = _bounded_walker()(latex, latex_context=self.context, tolerant_parsing=True)
            return walker.get_latex_nodes()[0]
        except (LatexWalkerError, IndexError, AttributeError, TypeError, AssertionError):
            # pylatexenc is tolerant, not infallible.
            raise ValueError("source: LaTeX that cannot be parsed") from None

    # -- gathering

    def end_flow(self) -> None:
        if self.flow is not None and self.flow.atoms:
            self.stack[-1].append(self.flow)
        self.flow = None

    def add(self, part: Part) -> None:
        self.end_flow()
        self.stack[-1].append(part)

    def atoms(self) -> list[Atom]:
        if self.flow is None:
            self.flow = Flow([])
        return self.flow.atoms

    def text(self, text: str) -> None:
        new = _WORD.findall(normalize_text(text).lower())
        if new:
            first = len(self.words)
            self.words.extend(new)
            self.atoms().append(Word(first, len(self.words)))

    def inside(self, nodes: Iterable, level: int = 0, label: str = "") -> Flow:
        """A flow of its own."""
        self.end_flow()
        self.stack.append([])
        self.flow = Flow([], level, label)
        self.walk(nodes)
        self.end_flow()
        flows = [part for part in self.stack.pop() if isinstance(part, Flow)]
        atoms = [atom for flow in flows for atom in flow.atoms]
        return Flow(atoms, level, label)

    def children(self, nodes: Iterable) -> list[Part]:
        self.end_flow()
        self.stack.append([])
        self.walk(nodes)
        self.end_flow()
        return self.stack.pop()

    # -- nodes

    def walk(self, nodes: Iterable) -> None:
        from pylatexenc import latexwalker as lw

        nodes = [node for node in nodes or [] if node is not None]
        for index, node in enumerate(nodes):
            if isinstance(node, lw.LatexCharsNode):
                self.characters(node.chars)
            elif isinstance(node, lw.LatexGroupNode):
                self.walk(node.nodelist)
            elif isinstance(node, lw.LatexMathNode):
                self.math(
                    node, nodes[index - 1] if index else None, nodes[index + 1] if index + 1 < len(nodes) else None
                )
            elif isinstance(node, lw.LatexEnvironmentNode):
                self.environment(node)
            elif isinstance(node, lw.LatexMacroNode):
                self.macro(node)
            elif isinstance(node, lw.LatexSpecialsNode) and node.specials_chars == "\n\n":
                self.end_flow()

    def characters(self, text: str) -> None:
        for index, paragraph in enumerate(re.split(r"\n\s*\n", text)):
            if index:
                self.end_flow()
            # Broken words must not be joined over what stands between, so each stretch is on its own.
            self.text(paragraph)

    def math(self, node, before, after) -> None:
        inner = "".join(child.latex_verbatim() for child in node.nodelist if child is not None)
        latex = markdown.normalize_formula(self.expand_math(inner))
        if not latex:
            return
        if node.displaytype == "display":
            self.add(Display(latex, len(self.words), False))
            return
        if latex in SIGNS:
            return  # a character that the text layer has
        left = " " if before is None else getattr(before, "chars", before.latex_verbatim()[-1:])
        right = " " if after is None else getattr(after, "chars", "")
        self.atoms().append(
            Math(
                latex,
                len(self.words),
                _spelling(re.search(r"(?<!\s)\s$|\s?[^\w\s]*$", left)[0]),
                _spelling(re.match(r"\s|[^\w\s]*\s?", right)[0]),
            )
        )

    def expand_math(self, latex: str, depth: int = 0) -> str:
        """User macros in a formula replaced by their bodies."""
        if depth > 6:
            return latex

        def one(match: re.Match) -> str:
            count, default, body = self.macros[match[1]]
            return body if count == 0 and default is None else match[0]

        names = [name for name in set(re.findall(r"\\([A-Za-z]+)", latex)) if name in self.macros]
        if not names:
            return latex
        pattern = re.compile(r"\\(" + "|".join(map(re.escape, names)) + r")(?![A-Za-z])")
        expanded = pattern.sub(one, latex)
        for name in names:
            count, default, body = self.macros[name]
            if count and default is None:
                expanded = self.expand_calls(expanded, name, count, body)
        return expanded if expanded == latex else self.expand_math(expanded, depth + 1)

    @staticmethod
    def expand_calls(latex: str, name: str, count: int, body: str) -> str:
        result, at = "", 0
        for match in re.finditer(rf"\\{name}(?![A-Za-z])", latex):
            if match.start() < at:
                continue
            end, arguments = match.end(), []
            while len(arguments) < count:
                space = re.match(r"\s*", latex[end:]).end()
                group = _group(latex, end + space) if latex[end + space : end + space + 1] == "{" else None
                if group is None:
                    break
                arguments.append(group)
                end += space + len(group) + 2
            if len(arguments) == count:
                filled = re.sub(r"#(\d)", lambda hit: arguments[int(hit[1]) - 1], body)  # noqa: B023
                result += latex[at : match.start()] + filled
                at = end
        return result + latex[at:]

    def environment(self, node) -> None:
        name = node.environmentname.rstrip("*")
        if name in SKIPPED:
            return
        if name in MATH:
            inner = "".join(child.latex_verbatim() for child in node.nodelist if child is not None)
            inner = self.expand_math(inner)
            numbered = not node.environmentname.endswith("*") and name not in ("displaymath", "math")
            inner = re.sub(r"\\(?:label|tag)\*?\s*\{[^}]*\}|\\(?:nonumber|notag)(?![A-Za-z])", "", inner)
            if name in ("align", "flalign", "alignat", "eqnarray") and ("&" in inner or "\\\\" in inner):
                inner = f"\\begin{{aligned}} {inner} \\end{{aligned}}"
            elif name in ("gather", "multline") and "\\\\" in inner:
                inner = f"\\begin{{gathered}} {inner} \\end{{gathered}}"
            latex = markdown.normalize_formula(inner)
            if latex and name == "alignat":
                self.add(Bad("page: alignat", len(self.words)))
            elif latex:
                self.add(Display(latex, len(self.words), numbered))
        elif name in ("itemize", "enumerate", "description", "compactitem", "compactenum", "trivlist"):
            self.listing(node, name)
        elif name in TABULAR:
            self.table(node)
        elif any(getattr(child, "macroname", None) == "item" for child in node.nodelist or []):
            self.listing(node, "description")
        elif name in ("quote", "quotation", "verse"):
            parts = self.children(node.nodelist)
            if parts:
                self.add(Quotation(parts))
        else:
            self.end_flow()
            self.walk(node.nodelist)
            self.end_flow()

    def listing(self, node, name: str) -> None:
        self.end_flow()
        items: list[list] = []
        for child in node.nodelist or []:
            if getattr(child, "macroname", None) == "item":
                items.append([])
                label = child.nodeargd.argnlist[0] if child.nodeargd and child.nodeargd.argnlist else None
                if label is not None:
                    items[-1].append(label)
            elif items:
                items[-1].append(child)
        kind = {"compactitem": "itemize", "compactenum": "enumerate", "trivlist": "description"}.get(name, name)
        parts = [found for item in items if (found := self.children(item))]
        if parts:
            self.add(Listing(kind, parts))

    def table(self, node) -> None:
        self.end_flow()
        latex = node.latex_verbatim()
        if re.search(r"\\(multicolumn|multirow|begin\{tabular)", latex[10:]) or "\\unitverbatim" in latex:
            at = len(self.words)
            self.children(node.nodelist)
            self.add(Bad("page: a table with spanning or nested cells", (at + len(self.words)) // 2))
            return
        rows: list[list[list]] = [[[]]]
        for child in node.nodelist or []:
            if getattr(child, "specials_chars", "") == "&":
                rows[-1].append([])
            elif getattr(child, "macroname", None) in ("\\", "tabularnewline"):
                rows.append([[]])
            elif not (len(rows[-1]) == 1 and getattr(child, "macroname", None) in ("hline", "toprule", "midrule")):
                rows[-1][-1].append(child)
        filled = [[self.inside(cell).atoms for cell in row] for row in rows]
        filled = [row for row in filled if any(row)]
        if filled:
            self.add(Grid(filled))

    def macro(self, node) -> None:
        name = node.macroname
        arguments = node.nodeargd.argnlist if node.nodeargd and node.nodeargd.argnlist else [None]
        if name in self.macros:
            self.user_macro(name, arguments)
        elif name in SECTIONS:
            self.add(self.inside([arguments[-1]], SECTIONS[name], "number"))
        elif name in RUN_IN:
            self.end_flow()
            self.walk([arguments[-1]])
        elif name == "caption":
            self.add(self.inside([arguments[-1]], 0, "caption"))
        elif name == "maketitle":
            if "title" in self.title:
                self.add(self.inside(self.title["title"], 1))
            for field_name in ("author", "date"):
                if field_name in self.title:
                    self.end_flow()
                    self.walk(self.title[field_name])
                    self.end_flow()
        elif name in ("title", "author", "date", "documentclass"):
            pass
        elif name in ("footnote", "footnotetext", "thanks", "footnotemark"):
            self.atoms().append(Bad("page: footnote", len(self.words)))
        elif name == "unitverb":
            self.text(self.verbatim[int(arguments[0].nodelist[0].chars)])
        elif name == "unitverbatim":
            self.lines(self.verbatim[int(arguments[0].nodelist[0].chars)])
        elif name == "par":
            self.end_flow()
        elif name in DRAWINGS:
            self.atoms().append(Bad("page: a drawing in the text", len(self.words)))
        elif name in HOLES:
            self.atoms().append(Hole(len(self.words)))
        elif name in INVISIBLE:
            pass
        elif name in FIRST_ARGUMENT_HIDDEN:
            self.walk([arguments[-1]])
        elif name in (
            "TeX",
            "LaTeX",
            "LaTeXe",
            "BibTeX",
            "XeTeX",
            "LuaTeX",
            "XeLaTeX",
            "LuaLaTeX",
            "pdfTeX",
            "pdfLaTeX",
        ):
            self.text(name if name != "LaTeXe" else "LaTeX2e")
        elif name in _LETTERS:
            self.text(_LETTERS[name])
        else:
            self.walk(arguments)

    def user_macro(self, name: str, arguments: list) -> None:
        self.expansions += 1
        if self.expansions > 20_000:
            raise ValueError("source: too many macros")
        _, default, body = self.macros[name]
        if len(body) > 2000 or f"\\{name}" in body:
            return
        texts = []
        for index, argument in enumerate(arguments):
            if argument is None:
                texts.append(default or "" if index == 0 else "")
            else:
                verbatim = argument.latex_verbatim()
                texts.append(verbatim[1:-1] if verbatim[:1] in "{[" else verbatim)
        filled = re.sub(r"#(\d)", lambda hit: texts[int(hit[1]) - 1] if int(hit[1]) <= len(texts) else "", body)
        if "@" not in filled:
            self.walk(self.nodes(filled))

    def lines(self, text: str) -> None:
        code = markdown.make_code(text.split("\n"))
        if code is None:
            return
        found = []
        for line in code.lines:
            first = len(self.words)
            self.words.extend(_WORD.findall(line.lower()))
            found.append((line, first, len(self.words)))
        self.add(Verbatim(found))


def _spelling(punctuation: str) -> str:
    """`normalize_text` that keeps a space at either end."""
    spaced = re.sub(r"\s+", " ", punctuation)
    return normalize_text(f"|{spaced}|")[1:-1]


_LETTERS = {"ss": "ß", "o": "ø", "O": "Ø", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "aa": "å", "AA": "Å", "l": "ł"}


# ------------------------------------------------------------------------------------------------------------ pages

TYPEWRITER = re.compile(r"tt\d|CMTT|LMMono|Mono|Courier|Typewriter|Inconsolata|Consola|tx?tt\b|LetterGothic", re.I)
BOLD = re.compile(r"CMBX|CMB\d|SFBX|ECBX|Bold|-Bd|Demi|Black|Heavy|Medi(?!um)|cmssbx|bx\d", re.I)
ITALIC = re.compile(r"CMTI|CMSL|CMBXTI|SFTI|SFSL|SFBI|ECTI|Ital|Obli|Slant|-It\b|CMITT|CMSLTT|CMSSI|ti\d", re.I)


@dataclass
class PageText:
    """The characters of a page in content order, hyphens at line ends undone, one line feed at a line's end."""

    text: str
    looks: list[int]  # of each character: 1 bold, 2 italic, 4 typewriter
    words: list[str]
    spans: list[tuple[int, int]]  # of the words in ``text``
    lefts: list[float]  # where each character of a typewriter face begins, points; NaN for others
    x_height: float = 0.0  # median, points


def read_page(page: pdfium.PdfPage) -> PageText:
    """Read the text layer of ``page`` with the looks of its characters.

    Raises:
        ValueError: the page is rotated or its fonts have no names: the reason that is counted.
    """
    if page.get_rotation() != 0:
        raise ValueError("page: rotated")
    textpage = page.get_textpage()
    raw = textpage.raw
    buffer, flags = ctypes.create_string_buffer(128), ctypes.c_int()
    known: dict[bytes, int] = {}
    text: list[str] = []
    looks: list[int] = []
    lefts: list[float] = []
    heights: list[float] = []
    nameless = 0
    edges = [ctypes.c_double() for _ in range(4)]
    pointers = [ctypes.byref(edge) for edge in edges]
    joining = False
    count = pdfium_c.FPDFText_CountChars(raw)
    for index in range(count):
        code = pdfium_c.FPDFText_GetUnicode(raw, index)
        if code in (10, 13):
            if not joining and text and text[-1] != "\n":
                text.append("\n")
                looks.append(looks[-1])
                lefts.append(math.nan)
            continue
        if code in SOFT_HYPHENS:
            joining = True
            continue
        joining = False
        if code in (32, 0xA0, 9):
            if text and text[-1] not in " \n":
                text.append(" ")
                looks.append(looks[-1])
                lefts.append(math.nan)
            continue
        buffer.value = b""
        pdfium_c.FPDFText_GetFontInfo(raw, index, buffer, 128, flags)
        name = buffer.value
        look = known.get(name)
        if look is None:
            decoded = re.sub(r"^[A-Z]{6}\+", "", name.decode("latin-1"))
            look = 4 if TYPEWRITER.search(decoded) else bool(BOLD.search(decoded)) + 2 * bool(ITALIC.search(decoded))
            known[name] = look
        nameless += not name
        character = chr(code)
        if character in X_HEIGHT_LETTERS and len(heights) < 400:
            pdfium_c.FPDFText_GetCharBox(raw, index, *pointers)
            heights.append(edges[3].value - edges[2].value)
        if code < 32 or 0xE000 <= code <= 0xF8FF or code >= 0xF0000:
            character = "\ufffd"
        left = math.nan
        if look & 4:
            pdfium_c.FPDFText_GetCharOrigin(raw, index, *pointers[:2])
            left = edges[0].value
        for part in normalize_character(character):
            text.append(part)
            looks.append(look)
            lefts.append(left)
    textpage.close()
    if nameless > 0.1 * max(len(text), 1):
        raise ValueError("page: fonts without names")
    whole = "".join(text)
    numbers = _page_numbers(whole)
    found = [match for match in _WORD.finditer(whole) if match.start() not in numbers]
    return PageText(
        whole,
        looks,
        [match[0].lower() for match in found],
        [match.span() for match in found],
        lefts,
        float(np.median(heights)) if heights else 0.0,
    )


def _page_numbers(text: str) -> set[int]:
    """Where the first and the last line of a page begin with nothing but its number on them."""
    found = set()
    for match in (re.match(r"\s*(\w+)\s*\n", text), re.search(r"\n\W*(\w+)\W*$", text)):
        if match and re.fullmatch(r"\d{1,4}|[ivxlc]{1,7}", match[1]):
            found.add(match.start(1))
    return found


# -------------------------------------------------------------------------------------------------------- alignment


class Refused(ValueError):
    """A page or document is not used; the message is the reason that is counted."""


class Aligned:
    """The outline of a source laid against the pages of its PDF."""

    def __init__(self, source: Source, pages: Sequence[PageText | None]):
        from rapidfuzz.distance import LCSseq

        self.source, self.pages = source, pages
        self.vocabulary = frozenset(source.words)
        printed = [word for page in pages if page is not None for word in page.words]
        self.offsets = [0]
        for page in pages:
            self.offsets.append(self.offsets[-1] + (len(page.words) if page is not None else 0))
        if max(len(source.words), len(printed)) > MOST_WORDS:
            raise Refused("document: too long to align")
        pairs = [
            (block.src_start + step, block.dest_start + step)
            for block in LCSseq.opcodes(source.words, printed)
            if block.tag == "equal"
            for step in range(block.src_end - block.src_start)
        ]
        # A word that agrees on its own, far from others that do, agrees by chance.
        self.match = np.full(len(source.words), -1, dtype=np.int64)
        for index, (here, there) in enumerate(pairs):
            for near in (index - 1, index + 1):
                if not 0 <= near < len(pairs):
                    continue
                if abs(pairs[near][0] - here) <= 4 and abs(pairs[near][1] - there) <= 6:
                    self.match[here] = there
        self.page_of = np.full(len(source.words), -1, dtype=np.int64)
        matched = self.match >= 0
        self.page_of[matched] = np.searchsorted(self.offsets, self.match[matched], side="right") - 1

    def blocks(self, number: int) -> tuple[tuple[Block, ...], float]:
        """What stands on page ``number``, and the share of words that agree.

        Raises:
            Refused: the page is not fit for use.
        """
        if self.pages[number] is None:
            raise Refused("page: text layer")
        mine = np.flatnonzero(self.page_of == number)
        if len(mine) < LEAST_WORDS:
            raise Refused("page: little text of the source")
        reader = _PageReader(self, number, int(mine[0]), int(mine[-1]))
        blocks = reader.all_parts(self.source.parts)
        reader.check_text_layer()
        share = reader.agreement(len(mine))
        if share < LEAST_AGREEMENT:
            raise Refused("page: source and page disagree")
        if reader.likeness(blocks) < LEAST_LIKENESS:
            raise Refused("page: target and page disagree")
        return blocks, share


_REFERENCE = re.compile(r"[\[(]?(?:[A-Z]?\d[\d.,:-]*|[A-Z])[\])]*[.,;:)]*$")
_NUMBER = re.compile(r"(?:(?:Chapter|Part|Appendix) )?(?:\d+(?:\.\d+)*\.?|[A-Z](?:\.\d+)*\.?|[IVX]+\.?)$")
_CAPTION = re.compile(r"(?:Figure|Fig\.|Table|Listing|Example|Algorithm) ?\d+(?:[.-]\d+)*[.:]?$", re.I)


class _PageReader:
    """Writes the parts of the outline that stand on one page, from the page's characters."""

    def __init__(self, aligned: Aligned, number: int, first: int, last: int):
        self.aligned, self.number = aligned, number
        self.page: PageText = aligned.pages[number]
        self.first, self.last = first, last  # words of the source
        self.offset = aligned.offsets[number]
        self.used = np.zeros(len(self.page.words), dtype=bool)
        self.formula_gaps: list[int] = []  # words of the page before which a formula stands

    def here(self, word: int) -> int:
        """Which word of the page the source's ``word`` is; -1 when it is not on this page."""
        return int(self.aligned.match[word]) - self.offset if self.aligned.page_of[word] == self.number else -1

    def inside(self, at: int) -> bool:
        """Whether a thing between the words ``at - 1`` and ``at`` of the source stands on this page.

        Raises:
            Refused: it stands between the pages.
        """
        if self.first < at <= self.last:
            return True
        if at in (self.first, self.last + 1):
            raise Refused("page: something without words at its edge")
        return False

    # -- parts

    def all_parts(self, parts: Iterable[Part]) -> tuple[Block, ...]:
        """The blocks of the page; short lines between two of them that only the page knows (a date, a heading that a
        class prints) are paragraphs."""
        blocks: list[Block] = []
        end = -1  # the last word of the page that a block used
        for part in parts:
            before, gaps = self.used.copy(), len(self.formula_gaps)
            new = list(self.parts([part]))
            words = np.flatnonzero(self.used & ~before)
            if len(words):
                if (
                    end >= 0
                    and words[0] > end + 1
                    and not any(end < at <= words[0] for at in self.formula_gaps[:gaps])
                ):
                    blocks.extend(self.only_printed(end, int(words[0])))
                end = max(end, int(words[-1]))
            blocks.extend(new)
        return tuple(blocks)

    def only_printed(self, before: int, after: int) -> list[Block]:
        """Whole lines between two words of the page, as a paragraph; nothing when they are long or not whole lines."""
        if after - before - 1 > MOST_PRINTED:
            return []
        start = self.page.text.find("\n", self.page.spans[before][1])
        end = self.page.text.rfind("\n", 0, self.page.spans[after][0])
        first, last = self.page.spans[before + 1][0], self.page.spans[after - 1][1]
        if not 0 <= start < first < last <= end:
            return []
        self.use(start, end)
        runs = self.printed(start + 1, end)
        return [Paragraph(markdown.writable(markdown.make_runs(runs)))]

    def printed(self, start: int, end: int) -> Iterator[Run]:
        """The characters ``start`` to ``end`` of the page in their looks."""
        at = start
        while at < end:
            stop = at + 1
            while stop < end and self.page.looks[stop] == self.page.looks[at]:
                stop += 1
            yield Run(self.page.text[at:stop].replace("\n", " "), **self.style(self.page.looks[at]))
            at = stop

    def parts(self, parts: Iterable[Part]) -> Iterator[Block]:
        for part in parts:
            match part:
                case Flow():
                    yield from self.flow(part)
                case Verbatim():
                    yield from self.verbatim(part)
                case Display(latex, at, numbered):
                    if self.inside(at):
                        yield self.display(latex, at, numbered)
                case Bad(reason, at):
                    if self.first <= at <= self.last + 1:
                        raise Refused(reason)
                case Quotation(inner):
                    blocks = tuple(self.parts(inner))
                    if blocks:
                        yield Quote(blocks)
                case Listing():
                    yield from self.listing(part)
                case Grid():
                    yield from self.grid(part)

    def flow(self, flow: Flow) -> Iterator[Block]:
        runs, start = self.runs(flow.atoms)
        if not runs:
            return
        prefix = self.before(start) if flow.label and start is not None else ""
        if prefix and (_NUMBER if flow.label == "number" else _CAPTION).match(prefix):
            self.use_line(start)
            runs = markdown.make_runs((Run(prefix + " ", **self.style(self.page.looks[start])), *runs))
        if flow.level:
            yield Heading(flow.level, markdown.make_runs(replace(run, bold=False) for run in runs))
        else:
            yield Paragraph(runs)

    def before(self, start: int) -> str:
        """What stands before character ``start`` on its line."""
        return self.page.text[self.page.text.rfind("\n", 0, start) + 1 : start].strip()

    def use_line(self, start: int) -> None:
        first = self.page.text.rfind("\n", 0, start) + 1
        self.use(first, start)

    def use(self, start: int, end: int) -> None:
        low = bisect.bisect_left(self.page.spans, (start, start))
        while low < len(self.page.spans) and self.page.spans[low][0] < end:
            self.used[low] = True
            low += 1

    def runs(self, atoms: Sequence[Atom]) -> tuple[Runs, int | None]:
        """The printed characters of some atoms, formulas from the source; and where the first character is."""
        text, page = self.page.text, self.page
        result: list[Run] = []
        start_of_all = None
        segment: list[Atom] = []
        previous: Math | None = None

        def flush(following: Math | None) -> None:
            nonlocal start_of_all
            words = [
                there for atom in segment if isinstance(atom, Word)
                for word in range(atom.first, atom.last) if (there := self.here(word)) >= 0
            ]  # fmt: skip
            if not words:
                return
            low, high = min(words), max(words)
            expected = sum(atom.last - atom.first for atom in segment if isinstance(atom, Word))
            between = high - low + 1 - len(words)
            if between > max(4, 0.35 * expected):
                raise Refused("page: text between that the source has not")
            start, end = page.spans[low][0], page.spans[high][1]
            touching = previous is not None and previous.after and not previous.after[-1].isspace()
            if not (previous is not None and (touching or not previous.after)):
                while start > 0 and not text[start - 1].isspace() and not text[start - 1].isalnum():
                    start -= 1
            if not (following is not None and following.before != " "):
                while end < len(text) and not text[end].isspace() and not text[end].isalnum():
                    end += 1
            if isinstance(segment[-1], Hole) and following is None:
                start_next = re.match(r"\s(\S+)", text[end:])
                if start_next and _REFERENCE.match(start_next[1]):
                    end += start_next.end()
            if isinstance(segment[0], Hole) and previous is None:
                token = re.search(r"(\S+)\s$", text[max(0, start - 20) : start])
                if token and _REFERENCE.match(token[1]):
                    start -= len(token[0])
            self.use(start, end)
            if start_of_all is None:
                start_of_all = start
            result.extend(self.printed(start, end))

        for atom in atoms:
            if isinstance(atom, Bad):
                if self.first <= atom.at <= self.last + 1:
                    raise Refused(atom.reason)
            elif isinstance(atom, Math):
                if not self.inside(atom.at):
                    segment, previous = [], None
                    continue
                flush(atom) if segment else None
                segment, previous = [], atom
                self.formula_gaps.append(self.next_word(atom.at))
                before, after = atom.before, atom.after
                result.append(Run(before if result else before.lstrip()))
                result.append(Run(atom.latex, math=True))
                result.append(Run(after))
            else:
                segment.append(atom)
        if segment:
            flush(None)
        runs = markdown.writable(markdown.make_runs(run for run in result if run.text))
        if any("\ufffd" in run.text for run in runs):
            raise Refused("page: text layer")
        return runs, start_of_all

    @staticmethod
    def style(look: int) -> dict[str, bool]:
        return {"code": True} if look & 4 else {"bold": bool(look & 1), "italic": bool(look & 2)}

    def next_word(self, at: int) -> int:
        """The first word of the page that belongs to a word of the source from ``at`` on."""
        for word in range(at, min(at + 40, len(self.aligned.source.words))):
            if (there := self.here(word)) >= 0:
                return there
        return len(self.page.words)

    def display(self, latex: str, at: int, numbered: bool) -> Formula:
        following = self.next_word(at)
        self.formula_gaps.append(following)
        if numbered:
            start = 0
            for word in range(at - 1, max(at - 40, -1), -1):
                if (there := self.here(word)) >= 0:
                    start = self.page.spans[there][1]
                    break
            end = self.page.spans[following][0] if following < len(self.page.spans) else len(self.page.text)
            numbers = re.findall(r"\((\d+(?:\.\d+)*[a-z]?)\)[ .,]*(?=\n|$)", self.page.text[start:end])
            if len(numbers) > 1:
                raise Refused("page: a formula with several numbers")
            if numbers:
                latex += f" \\tag{{{numbers[0]}}}"
        return Formula(latex)

    def verbatim(self, part: Verbatim) -> Iterator[Block]:
        lines: list[str] = []
        open_lines: list[str] = []
        start = len(self.page.text)  # of the first line on the page
        for line, first, last in part.lines:
            if first == last:
                open_lines.append(line)  # no words: with the lines around it
                continue
            on = [there for word in range(first, last) if (there := self.here(word)) >= 0]
            if len(on) >= 0.6 * (last - first):
                lines.extend(open_lines if lines or first > self.first else [])
                lines.append(line)
                start = min(start, self.page.spans[min(on)][0])
                self.used[min(on) : max(on) + 1] = True
            elif on:
                raise Refused("page: verbatim text printed otherwise")
            open_lines = []
        if open_lines and lines and part.lines[-1][2] <= self.last:
            lines.extend(open_lines)
        # How far all lines are indented is the page's affair.
        code = markdown.make_code(textwrap.dedent("\n".join(lines)).split("\n"))
        if code is None:
            return
        code = markdown.make_code(self.as_indented(code.lines, start))
        printed = re.sub(r"\s", "", self.page.text)
        if any(line.replace(" ", "") not in printed for line in code.lines):
            raise Refused("page: verbatim text printed otherwise")
        yield code

    def as_indented(self, lines: Sequence[str], start: int) -> Sequence[str]:
        """Lines of code, the first with its first word at character ``start``, indented as on the page: what a tab is
        worth is the page's affair too. As they are when the page's lines are others or no face of one width."""
        text, lefts = self.page.text, self.page.lefts
        lines_before = next(number for number, line in enumerate(filter(None, lines)) if _WORD.search(line))
        at = text.rfind("\n", 0, start) + 1
        for _ in range(lines_before):
            at = text.rfind("\n", 0, max(at - 1, 0)) + 1
        places, pitches = [], []
        for line in filter(None, lines):
            end = text.find("\n", at) if "\n" in text[at:] else len(text)
            characters = [index for index in range(at, end) if not text[index].isspace()]
            if "".join(text[index] for index in characters) != re.sub(r"\s", "", line):
                return lines
            places.append(lefts[characters[0]])
            # of neighbours in the source, which no space parts
            for index, following in pairwise(characters):
                if following == index + 1:
                    pitches.append(lefts[following] - lefts[index])
            at = end + 1
        if not pitches or not np.isfinite([*places, *pitches]).all():
            return lines
        pitch = float(np.median(pitches))
        if pitch <= 0 or np.mean(np.abs(np.array(pitches) / pitch - 1) < 0.05) < 0.9:
            return lines
        indents = iter(np.round((np.array(places) - min(places)) / pitch).astype(int).tolist())
        return [line and " " * next(indents) + line.lstrip() for line in lines]

    def listing(self, part: Listing) -> Iterator[Block]:
        items: list[tuple[int | None, tuple[Block, ...]]] = []
        for inner in part.items:
            blocks = list(self.parts(inner))
            if not blocks:
                continue
            begin = _first_word(inner)
            if begin is not None and begin < self.first:
                yield from blocks  # the rest of an item whose mark stands on the page before
                continue
            number = None
            head = next((piece for piece in inner if isinstance(piece, Flow)), None)
            start = self.start_of(head) if head is not None else None
            if part.kind == "enumerate" and start is not None:
                label = self.before(start)
                if found := re.fullmatch(r"\(?(\d+)[.):]?", label):
                    number = int(found[1])
                    self.use_line(start)
                elif label and len(label) <= 6 and isinstance(blocks[0], Paragraph):
                    self.use_line(start)
                    blocks[0] = Paragraph(markdown.make_runs((Run(label + " "), *blocks[0].runs)))
            items.append((number, tuple(blocks)))
        if not items:
            return
        numbers = [number for number, _ in items]
        if None not in numbers:
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                raise Refused("page: a list whose numbers jump")
            yield Items(True, numbers[0], tuple(blocks for _, blocks in items))
        elif all(number is None for number in numbers):
            yield Items(False, 0, tuple(blocks for _, blocks in items))
        else:
            raise Refused("page: a list whose numbers jump")

    def start_of(self, flow: Flow) -> int | None:
        """Where a flow begins on the page; None when it begins on another."""
        words = [word for atom in flow.atoms if isinstance(atom, Word) for word in range(atom.first, atom.last)]
        for word in words[:3]:
            if (there := self.here(word)) >= 0:
                return self.page.spans[there][0]
        return None

    def grid(self, grid: Grid) -> Iterator[Block]:
        rows = [[self.runs(cell)[0] for cell in row] for row in grid.rows]
        rows = [row for row in rows if any(row)]
        if not rows:
            return
        columns = max(len(row) for row in rows)
        if columns < 2:
            raise Refused("page: a table of one column")
        filled = [(*row, *[()] * (columns - len(row))) for row in rows]
        header = tuple(markdown.make_runs(replace(run, bold=False) for run in cell) for cell in filled[0])
        yield Table(header, tuple(filled[1:]))

    # -- judgement

    def likeness(self, blocks: Sequence[Block]) -> float:
        """Likeness of all characters of the target to those of the page from its first word in use to its last:
        spaces and markup aside, of formulas the letters and digits that are not commands."""
        from rapidfuzz.distance import Indel

        used = np.flatnonzero(self.used)
        start, end = self.page.spans[used[0]][0], self.page.spans[used[-1]][1]
        while start > 0 and not self.page.text[start - 1].isspace():
            start -= 1
        while end < len(self.page.text) and not self.page.text[end].isspace():
            end += 1
        printed = re.sub(r"\s+", "", self.page.text[start:end])
        return Indel.normalized_similarity(_characters(blocks), printed)

    def check_text_layer(self) -> None:
        """Refuse a page with words like "deVnes" or "prexes": ligatures of a font without a table of characters.

        Raises:
            Refused: there is such a word among those used, or one nearly as the source spells it in that place.
        """
        from rapidfuzz.distance import Indel

        known = self.aligned.vocabulary
        for index in np.flatnonzero(self.used):
            start, end = self.page.spans[index]
            if re.search("[a-z][A-Z]", self.page.text[start:end]) and self.page.words[index] not in known:
                raise Refused("page: text layer")
        matched = [word for word in range(self.first, self.last + 1) if self.here(word) >= 0]
        for before, after in pairwise(matched):
            spelled = self.aligned.source.words[before + 1 : after]
            printed = self.page.words[self.here(before) + 1 : self.here(after)]
            if len(spelled) * len(printed) > 100:
                continue
            for one in spelled:
                if any(word not in known and Indel.normalized_similarity(one, word) > 0.6 for word in printed):
                    raise Refused("page: text layer")

    def agreement(self, matched: int) -> float:
        """Words that agree, as a share of those on the page or in the source for it."""
        used = np.flatnonzero(self.used)
        if not len(used):
            return 0.0
        extra = ~self.used
        # Running heads and feet.
        if used[0] <= MOST_FURNITURE:
            extra[: used[0]] = False
        if len(extra) - 1 - used[-1] <= MOST_FURNITURE:
            extra[used[-1] + 1 :] = False
        # What stands before the word that follows a formula is the formula.
        for at in self.formula_gaps:
            back = at - 1
            while back >= 0 and not self.used[back]:
                extra[back] = False
                back -= 1
        missing = (self.last - self.first + 1) - matched
        agreed = int(self.used.sum())
        return agreed / (agreed + int(extra.sum()) + missing)


def _first_word(parts: Iterable[Part]) -> int | None:
    """The first word of some parts of the outline; None when they have none."""
    for part in parts:
        match part:
            case Flow(atoms):
                found = next((atom.first for atom in atoms if isinstance(atom, Word)), None)
            case Verbatim(lines):
                found = lines[0][1]
            case Listing(_, items):
                found = next((word for item in items if (word := _first_word(item)) is not None), None)
            case Quotation(inner):
                found = _first_word(inner)
            case Grid(rows):
                found = _first_word(Flow(cell) for row in rows for cell in row)
            case _:
                found = None
        if found is not None:
            return found
    return None


def _characters(blocks: Iterable[Block]) -> str:
    def of_runs(runs: Runs) -> str:
        return "".join(_of_formula(run.text) if run.math else run.text for run in runs)

    found = []
    for block in blocks:
        match block:
            case Heading(_, runs) | Paragraph(runs):
                found.append(of_runs(runs))
            case Formula(latex):
                found.append(_of_formula(latex))
            case Code(lines):
                found.extend(lines)
            case Quote(inner):
                found.append(_characters(inner))
            case Items(ordered, start, items):
                for number, item in enumerate(items, start):
                    found.append((f"{number}." if ordered else "\u2022") + _characters(item))
            case Table(header, rows):
                found.extend(of_runs(cell) for row in (header, *rows) for cell in row)
    return re.sub(r"\s+", "", "".join(found))


def _of_formula(latex: str) -> str:
    """The characters of a formula that print as they are."""
    latex = re.sub(r"\\(?:begin|end)\s*\{\w+\}|\\tag", "", latex)
    return re.sub(r"\\[A-Za-z]+|[\\{}^_&\s]", "", latex)


# ------------------------------------------------------------------------------------------------- documents to rows


def find_pairs(tree: Path) -> list[tuple[Path, Path]]:
    """PDFs below ``tree`` with a ``.tex`` or ``.tex.gz`` of the same name beside them, as (pdf, tex).

    (Debian compresses documentation above 4 kB.)
    """
    pairs = []
    for path in sorted(tree.rglob("*.pdf")):
        if path.is_file() and not path.is_symlink():
            for suffix in (".tex", ".tex.gz"):
                if (source := path.with_suffix(suffix)).is_file():
                    pairs.append((path, source))
                    break
    return pairs


def read_latex(path: Path, depth: int = 0) -> str:
    """A LaTeX file's text, UTF-8 or else Latin-1, with the files beside it that ``\\input`` or ``\\include`` name.

    Raises:
        Refused: it is too large, or no archive where its name says so.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise Refused("source: cannot be read") from None
    if len(content) > MOST_BYTES:
        raise Refused("source: over 600 kB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if depth == 4:
        return text

    def one(match: re.Match) -> str:
        name = match[1].strip()
        inner = path.parent / (name if name.endswith(".tex") else name + ".tex")
        if not inner.is_file():
            inner = inner.with_suffix(".tex.gz")
        if inner == path or ".." in inner.parts or not inner.is_file():
            return match[0]
        return read_latex(inner, depth + 1)

    return re.sub(r"^[ \t]*\\(?:input|include)\s*\{([\w./ -]+)\}", one, text, flags=re.MULTILINE)


@dataclass
class PdfPage:
    """A page with its target."""

    number: int  # from 0
    pixels: np.ndarray  # (H, W) uint8
    blocks: tuple[Block, ...]
    agreement: float
    x_height: float  # px
    text: str  # of the text layer


def pages_of_document(
    pdf: Path, tex: Path, size: int, most_pages: int, refusals: Counter, least_x_height: float = 4.0
) -> Iterator[PdfPage]:
    """Pages of ``pdf`` that agree with ``tex``; reasons for the others are counted in ``refusals``.

    Args:
        size: longer side of a page image in pixels, after cutting off the margins.
        most_pages: of the document.
        least_x_height: in pixels; pages set smaller at this size are refused.
    """
    try:
        source = read_source(read_latex(tex))
        document = pdfium.PdfDocument(pdf)
    except pdfium.PdfiumError:
        refusals["document: cannot be opened"] += 1
        return
    except ValueError as reason:
        refusals[str(reason)] += 1
        return
    try:
        pages: list[PageText | None] = []
        printed = 0
        for page in document:
            if max(len(source.words), printed) > MOST_WORDS:  # `Aligned` would say so once all pages are read
                refusals["document: too long to align"] += 1
                return
            try:
                pages.append(read_page(page))
                printed += len(pages[-1].words)
            except (ValueError, pdfium.PdfiumError) as reason:
                refusals[str(reason) if isinstance(reason, ValueError) else "page: cannot be read"] += 1
                pages.append(None)
        try:
            aligned = Aligned(source, pages)
        except Refused as reason:
            refusals[str(reason)] += 1
            return
        found = 0
        for number, text in enumerate(pages):
            if text is None or found == most_pages:
                continue
            try:
                blocks, agreement = aligned.blocks(number)
                if markdown.parse(markdown.write(blocks)) != blocks:
                    raise Refused("page: reading the target gives other blocks")
                pixels, scale = render(document[number], size)
                if text.x_height * scale < least_x_height:
                    raise Refused("page: type too small at this size")
            except Refused as reason:
                refusals[str(reason)] += 1
                continue
            except pdfium.PdfiumError:
                refusals["page: cannot be rendered"] += 1
                continue
            found += 1
            yield PdfPage(number, pixels, blocks, agreement, text.x_height * scale, text.text)
    finally:
        document.close()


def render(page: pdfium.PdfPage, size: int) -> tuple[np.ndarray, float]:
    """Grey pixels of a page without its empty margins, longer side ``size``, and pixels a point.

    Raises:
        Refused: the page is empty.
    """
    small = np.asarray(page.render(scale=0.5, grayscale=True).to_numpy()).squeeze()
    rows, columns = np.flatnonzero((small < 200).any(1)), np.flatnonzero((small < 200).any(0))
    if not len(rows):
        raise Refused("page: nothing on it")
    width, height = page.get_size()
    margin = 8.0  # points
    left, right = max(0.0, columns[0] * 2 - margin), min(width, columns[-1] * 2 + 2 + margin)
    top, bottom = max(0.0, rows[0] * 2 - margin), min(height, rows[-1] * 2 + 2 + margin)
    scale = (size + 0.5) / max(right - left, bottom - top)  # pdfium rounds down
    pixels = page.render(
        scale=scale, grayscale=True, crop=(left, height - bottom, width - right, top)
    ).to_numpy().squeeze()  # fmt: skip
    return np.ascontiguousarray(pixels[:size, :size]), scale


def _rows_of_document(
    task: tuple[str, str, str, str], size: int, most_pages: int, split: str, unwanted: Callable[[str], bool]
) -> tuple[list[dict], Report]:
    """Rows of one document: (package, tree, pdf, tex)."""
    package, tree, pdf, tex = task
    begin = time.perf_counter()
    report = Report(documents=1)
    rows = []
    for page in pages_of_document(Path(tree) / pdf, Path(tree) / tex, size, most_pages, report.refusals):
        target = markdown.write(page.blocks)
        if unwanted(markdown.visible_text(page.blocks)) or unwanted(target):
            report.refusals["page: shares text with held-out documents"] += 1
            continue
        rows.append(
            make_row(
                page.pixels,
                target,
                task="markdown",
                kind="document",
                x_height=page.x_height,
                source=f"{package}/{pdf}#{page.number + 1}",
                license=PAGE_LICENSE,
                split=split,
            )
        )
    report.rows = report.pages_used = len(rows)
    report.pages = len(rows) + sum(count for reason, count in report.refusals.items() if reason.startswith("page:"))
    report.page_seconds = time.perf_counter() - begin
    return rows, report


def build_latex_pages(
    packages: Sequence[str],
    out: str | Path,
    *,
    count: int | None = None,
    size: int = 896,
    seed: int = 0,
    split: str = "train",
    workers: int = 1,
    pages_per_pdf: int = 12,
    unwanted: Callable[[str], bool] = lambda text: False,
    progress: bool = True,
) -> Report:
    """Build a data set of real pages with Markdown from Debian packages of TeX documentation.

    Args:
        packages: names of Debian packages.
        out: folder for the shards and ``report.json``.
        count: rows at most; None for all.
        size: longer side of a page image in pixels.
        seed: of the order of documents; the same seed gives the same rows, whatever ``workers`` is.
        split: ``train`` or ``validation``; see `heldout.refuse_validation_packages`.
        workers: processes.
        pages_per_pdf: at most so many pages of a document.
        unwanted: pages to leave out, by their visible text.
        progress: show a bar.

    Raises:
        ModuleNotFoundError: pylatexenc is not installed.
        TooManyRefused: over a twentieth of a package's documents, of 200 or more, cannot be opened, crash the reader
            or overrun `DOCUMENT_SECONDS`.
    """
    import pylatexenc  # noqa: F401 (complain now, not in a worker)
    from tqdm import tqdm

    begin = time.perf_counter()
    tasks = [
        (package, str(tree), str(pdf.relative_to(tree)), str(tex.relative_to(tree)))
        for package in packages
        for tree in [fetch_deb(package)]
        for pdf, tex in find_pairs(tree)
    ]
    tasks = [tasks[index] for index in np.random.default_rng(seed).permutation(len(tasks))]
    report, damaged = Report(), Refusals()

    def collect(results) -> Iterator[dict]:
        for (package, _, pdf, _), result in results:
            report.documents += 1
            bar.update()
            if isinstance(result, Failure):
                reason, detail = why(result)
                report.refusals[f"document: {reason}"] += 1
                damaged.add(package, f"document: {reason}", f"{pdf}{detail and ': '}{detail}")
                continue
            rows, part = result
            found = part.refusals["document: cannot be opened"]
            damaged.add(package, "document: cannot be opened", pdf) if found else damaged.accept(package)
            report.pages += part.pages
            report.page_seconds += part.page_seconds
            report.refusals.update(+part.refusals)
            rows = rows if count is None else rows[: count - report.rows]
            report.rows += len(rows)
            report.pages_used += len(rows)
            bar.set_postfix(rows=report.rows, refresh=False)
            yield from rows
            if count is not None and report.rows >= count:
                return

    results = run_guarded(
        lambda task: _rows_of_document(task, size, pages_per_pdf, split, unwanted),
        tasks,
        workers=workers,
        seconds=lambda task: DOCUMENT_SECONDS,
    )
    with tqdm(total=len(tasks), unit="document", disable=not progress) as bar, closing(results):
        write_shards(collect(results), out)
    report.seconds = time.perf_counter() - begin
    settings = {"packages": list(packages), "seed": seed, "size": size, "split": split, "pages_per_pdf": pages_per_pdf}
    report.save(Path(out), **settings, least_agreement=LEAST_AGREEMENT, damaged=damaged.as_dict())
    return report
