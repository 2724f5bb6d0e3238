"""The one dialect of Markdown that pages are labelled in: read any Markdown, write only this.

The target of a page must be decided by what can be seen on it. So, before anything is typeset or written:

=====================  ==============================================================================================
what a file may hold   what is kept of it
=====================  ==============================================================================================
heading                ``# `` to ``###### ``, on one line
paragraph              one line; a hard line break becomes a space, for nobody can tell it from the end of a line
emphasis               ``**bold**``, ``*italic*``, ``***both***``, ``~~struck~~``; two alike with nothing but a space
                       between are one; where CommonMark has no way to write it (``a**"b"**c``), it is left out
code in a line         `````code`````; runs of spaces are one space
link                   its text; the address cannot be seen. ``<https://…>`` is its own text
picture                nothing; a paragraph of pictures alone goes
formula                ``$…$`` in a line and in LaTeX, ``$$…$$`` on a line of its own; also from ``math`` fences and
                       from ``<div class="equation" data-raw-text="…">``
list                   ``- `` or ``1. `` with the numbers as shown; what belongs to an item is indented by the
                       marker's width; no empty line between items, one between the further blocks of an item
                       but before a list of bullets or from 1
table                  ``| a | b |``, separator ``| --- | --- |``: alignment is a matter of typesetting; ``|`` in a
                       cell is ``\\|``
code block             a fence of three backticks or more without its language; tabs are 4 spaces, no space at a
                       line's end, no empty lines at the ends
quotation              ``> `` before each line, an empty one between its blocks
rule                   ``---``
HTML                   tags, comments and whole HTML blocks are left out, the text between inline tags stays
front matter           left out
emoji, dingbats        left out: text fonts have none
characters             `text.normalize_text`: straight quotes, plain hyphens, NFKC; entities are their characters
=====================  ==============================================================================================

Escapes are a function of the text alone: a backslash before each ``\\``, `````, ``*`` and ``$``, before ``_`` at
either end of a word, ``<`` and ``&`` where a tag or an entity would begin, ``]`` before ``(`` or ``:``, ``~~``, and
before what would begin a heading, list, quotation or rule at the beginning of a paragraph.

`parse` reads, `write` writes, and ``parse(write(blocks)) == blocks`` for every page that is kept.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby

from .text import normalize_character, normalize_text

# ---------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Run:
    """Text in one style. ``code`` and ``math`` exclude each other; a formula's text is its LaTeX, without dollars."""

    text: str
    bold: bool = False
    italic: bool = False
    struck: bool = False
    code: bool = False
    math: bool = False


Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Heading:
    level: int  # 1 to 6
    runs: Runs


@dataclass(frozen=True)
class Paragraph:
    runs: Runs


@dataclass(frozen=True)
class Code:
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Formula:
    latex: str


@dataclass(frozen=True)
class Quote:
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Items:
    """A list; ``start`` is the number of the first item, 0 for a list of bullets that are not numbered."""

    ordered: bool
    start: int
    items: tuple[tuple[Block, ...], ...]


@dataclass(frozen=True)
class Table:
    header: tuple[Runs, ...]
    rows: tuple[tuple[Runs, ...], ...]


@dataclass(frozen=True)
class Rule:
    pass


Block = Heading | Paragraph | Code | Formula | Quote | Items | Table | Rule


# ------------------------------------------------------------------------------------------------- runs and words


def split_words(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs to words: lists of fragments with no space between them; a formula is one fragment whatever it holds."""
    words: list[list[Run]] = [[]]
    for run in runs:
        if run.math:
            words[-1].append(run)
            continue
        parts = re.split(r"\s+", run.text)
        for index, part in enumerate(parts):
            if index:
                words.append([])
            if part:
                words[-1].append(replace(run, text=part))
    return [word for word in words if word]


def join_words(words: Sequence[Sequence[Run]]) -> Runs:
    """The inverse: one space between words, in the style that both neighbours share; runs of one style made one."""
    runs: list[Run] = []
    for word in words:
        if runs:
            before, after = runs[-1], word[0]
            code = before.code and after.code
            runs.append(
                Run(
                    " ",
                    before.bold and after.bold,
                    before.italic and after.italic,
                    before.struck and after.struck,
                    code=code,
                )
            )
        runs.extend(word)
    return merge_runs(runs)


def merge_runs(runs: Iterable[Run]) -> Runs:
    """Neighbours of one style become one run; formulas stay apart."""
    merged: list[Run] = []
    for run in runs:
        if merged and not run.math and replace(merged[-1], text="") == replace(run, text=""):
            merged[-1] = replace(run, text=merged[-1].text + run.text)
        elif run.text:
            merged.append(run)
    return tuple(merged)


def plain(runs: Iterable[Run]) -> str:
    """What a reader sees of ``runs``, without markup; formulas as their LaTeX."""
    return "".join(run.text for run in runs)


def visible_text(blocks: Iterable[Block], formulas: bool = False) -> str:
    """All text of ``blocks`` without markup, a line for each paragraph, cell or line of code.

    >>> visible_text(parse("# A *b*\\n\\n- c `d`"))
    'A b\\nc d'
    """

    def of_runs(runs: Runs) -> str:
        return "".join(run.text if formulas or not run.math else " " for run in runs)

    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading(_, runs) | Paragraph(runs):
                lines.append(of_runs(runs))
            case Code(code):
                lines.extend(code)
            case Formula(latex):
                lines.extend([latex] if formulas else [])
            case Quote(inner):
                lines.append(visible_text(inner, formulas))
            case Items(_, _, items):
                lines.extend(visible_text(item, formulas) for item in items)
            case Table(header, rows):
                lines.extend(of_runs(cell) for row in (header, *rows) for cell in row)
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- writing

_SPECIAL = re.compile(
    r"[\\`*$]"  # always
    r"|(?<![^\W_])_|_(?![^\W_])"  # at an end of a word, where it could be emphasis
    r"|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(:])|~(?=~)|(?<=~)~"
)
_AT_START = re.compile(r"(?:#{1,6}(?= |$)|>|[-+](?= |$)|=+ *$|-(?=[- ]*$)|~(?=~~))")
_NUMBERED = re.compile(r"\d{1,9}(?=[.)](?: |$))")


def escape(text: str) -> str:
    """``text`` with a backslash before what would be markup, as the module's docstring lists.

    >>> escape("a*b, snake_case, _private and x < 3 <b>")
    'a\\\\*b, snake_case, \\\\_private and x < 3 \\\\<b>'
    """
    return _SPECIAL.sub(lambda match: "\\" + match[0], text)


def _code_span(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def write_runs(runs: Sequence[Run]) -> str:
    """One line of inline Markdown."""
    return _write_styles(list(runs), (("bold", "**"), ("italic", "*"), ("struck", "~~")))


def _write_styles(runs: list[Run], styles: tuple[tuple[str, str], ...]) -> str:
    if not styles:
        return "".join(f"${run.text}$" if run.math else _code_span(run.text) if run.code else run.text for run in runs)
    (name, mark), *others = styles
    written = ""
    for marked, group in groupby(runs, key=lambda run: getattr(run, name)):
        inner = _write_styles(list(group), tuple(others))
        if marked:
            core = inner.strip(" ")
            left = len(inner) - len(inner.lstrip(" "))
            written += inner[:left] + mark + core + mark + inner[left + len(core) :]
        else:
            written += inner
    return written


def _escaped(runs: Sequence[Run]) -> list[Run]:
    """Text runs escaped with what stands beside them in view."""
    result = []
    texts = [run.text if not (run.code or run.math) else "\0" for run in runs]
    for index, run in enumerate(runs):
        if run.code or run.math:
            result.append(run)
            continue
        before = "".join(texts[:index])[-2:]
        after = "".join(texts[index + 1 :])[:12]
        whole = before + run.text + after
        pieces, at = [], len(before)
        for match in _SPECIAL.finditer(whole):
            if len(before) <= match.start() < len(before) + len(run.text):
                pieces.append(whole[at : match.start()] + "\\" + match[0])
                at = match.end()
        pieces.append(whole[at : len(before) + len(run.text)])
        result.append(replace(run, text="".join(pieces)))
    return result


def _inline(runs: Sequence[Run], cell: bool = False) -> str:
    line = write_runs(_escaped(runs))
    return line.replace("|", "\\|") if cell else line


def _paragraph(runs: Sequence[Run]) -> str:
    line = _inline(runs)
    if found := _AT_START.match(line):
        return "\\" + line if found else line
    if found := _NUMBERED.match(line):
        return line[: found.end()] + "\\" + line[found.end() :]
    return line


def write(blocks: Iterable[Block]) -> str:
    """Blocks to Markdown, without a line feed at the end."""
    return "\n\n".join("\n".join(_lines(block)) for block in blocks)


def _lines(block: Block) -> list[str]:
    match block:
        case Heading(level, runs):
            line = _inline(runs)
            return ["#" * level + " " + re.sub(r"(#+)$", r"\\\1", line)]
        case Paragraph(runs):
            return [_paragraph(runs)]
        case Code(lines):
            longest = max((len(found) for line in lines for found in re.findall(r"^ *(`{3,})", line)), default=2)
            fence = "`" * (longest + 1)
            return [fence, *lines, fence]
        case Formula(latex):
            return [f"$${latex}$$"]
        case Rule():
            return ["---"]
        case Quote(inner):
            return [f"> {line}".rstrip() for line in write(inner).split("\n")]
        case Table(header, rows):
            lines = ["| " + " | ".join(_inline(cell, cell=True) for cell in row) + " |" for row in (header, *rows)]
            return [lines[0], "| " + " | ".join("---" for _ in header) + " |", *lines[1:]]
        case Items(ordered, start, items):
            lines = []
            for number, item in enumerate(items, start):
                marker = f"{number}. " if ordered else "- "
                body: list[str] = []
                for before, part in zip((None, *item), item, strict=False):
                    # A list of numbers above 1 cannot follow a paragraph without an empty line.
                    follows = isinstance(part, Items) and isinstance(before, Paragraph) and part.start <= 1
                    if before is not None and not follows:
                        body.append("")
                    body.extend(_lines(part))
                lines.append(marker + body[0])
                lines.extend(" " * len(marker) + line if line else "" for line in body[1:])
            return lines
    raise TypeError(f"{type(block).__name__} is no block of Markdown")


# --------------------------------------------------------------------------------------------------------- reading

_FRONT_MATTER = re.compile(r"\A---\n.*?\n(?:---|\.\.\.)\n", re.DOTALL)
# How READMEs of mathematical packages carry LaTeX beside a picture of the formula.
_EQUATION = re.compile(r'<div class="equation"[^>]*\bdata-raw-text="([^"]*)"')
_MATHEMATICAL = re.compile(r"[\\^_=]|^[A-Za-z]$")  # ours: tells $x^2$ from $HOME:$PATH in files that know no formulas


@lru_cache(maxsize=1)
def _parser():
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "formula", _inline_formula)
    parser.block.ruler.before(
        "fence", "formula", _block_formula, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    return parser


def _inline_formula(state, silent: bool) -> bool:
    """``$…$`` as pandoc reads it: no space inside the dollars, no digit after the second."""
    text, start = state.src, state.pos
    if text[start] != "$" or start + 1 >= state.posMax or text[start + 1] in " \t\n$":
        return False
    end = start + 1
    while end < state.posMax and text[end] != "$":
        end += 2 if text[end] == "\\" else 1
    if end >= state.posMax or text[end - 1] in " \t\n" or (end + 1 < state.posMax and text[end + 1].isdigit()):
        return False
    if not silent:
        state.push("formula", "", 0).content = text[start + 1 : end]
    state.pos = end + 1
    return True


def _block_formula(state, first: int, last: int, silent: bool) -> bool:
    """``$$…$$`` beginning a line and ending one."""
    if state.is_code_block(first):
        return False
    text = []
    for line in range(first, last):
        if line > first and (state.isEmpty(line) or state.sCount[line] < state.blkIndent):
            return False
        text.append(state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip())
        whole = " ".join(text)
        if not whole.startswith("$$"):
            return False
        if len(whole) > 4 and whole.endswith("$$") and not whole.endswith("\\$$"):
            if silent:
                return True
            token = state.push("formula_block", "", 0)
            token.content, token.map, state.line = whole[2:-2], [first, line + 1], line + 1
            return True
    return False


Skip = Callable[[str], None]


def parse(text: str, *, foreign: bool = False, skipped: Skip = lambda reason: None) -> tuple[Block, ...]:
    """Read Markdown (CommonMark with GitHub's tables and strikethrough, and formulas) into blocks of the dialect.

    Args:
        text: the file's content.
        foreign: of a file that need not mean a formula where a dollar stands; also takes front matter away.
        skipped: called with a reason for each block that is left out.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if foreign:
        text = _FRONT_MATTER.sub("", text)
    return tuple(_Reader(_parser().parse(text), foreign, skipped).blocks(None))


@dataclass
class _Reader:
    tokens: list
    foreign: bool
    skipped: Skip
    at: int = field(default=0, init=False)

    def blocks(self, end: str | None) -> list[Block]:
        """Blocks up to the token of type ``end``, which is consumed."""
        found: list[Block] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            self.at += 1
            if token.type == end:
                break
            block = self.block(token)
            before = found[-1] if found else None
            if isinstance(block, Items) and isinstance(before, Items) and not (block.ordered or before.ordered):
                # Two lists of bullets in a row look like one.
                found[-1] = replace(before, items=before.items + block.items)
            elif block is not None:
                found.append(block)
        return found

    def block(self, token) -> Block | None:
        match token.type:
            case "heading_open":
                runs = self.inline()
                if not runs:
                    return self.skip("block: no words")
                # Emphasis cannot be seen in a heading that is bold by itself.
                return Heading(int(token.tag[1]), merge_runs(replace(run, bold=False) for run in runs))
            case "paragraph_open":
                runs = self.inline()
                seen = plain(runs)
                if any(run.math for run in runs) or any(character.isalnum() for character in seen):
                    return Paragraph(runs)
                return self.skip("block: no words")
            case "fence" | "code_block":
                if token.info.strip() == "math" and self.foreign:
                    return self.formula(token.content)
                return make_code(token.content.split("\n")) or self.skip("block: no words")
            case "formula_block":
                return self.formula(token.content)
            case "blockquote_open":
                inner = self.blocks("blockquote_close")
                return Quote(tuple(inner)) if inner else self.skip("block: no words")
            case "bullet_list_open" | "ordered_list_open":
                return self.items(token)
            case "table_open":
                return self.table()
            case "hr":
                return Rule()
            case "html_block":
                if equation := _EQUATION.search(token.content):
                    return self.formula(html.unescape(equation[1]))
                seen = re.sub(r"<!--.*?(-->|\Z)|<[^>]*>?", "", token.content, flags=re.DOTALL)
                return self.skip("block: HTML") if seen.strip() else None
        return None

    def skip(self, reason: str) -> None:
        self.skipped(reason)

    def formula(self, latex: str) -> Formula | None:
        latex = normalize_formula(latex)
        return Formula(latex) if latex else self.skip("block: no words")

    def items(self, token) -> Items | None:
        ordered = token.type == "ordered_list_open"
        end = token.type.replace("open", "close")
        items: list[tuple[Block, ...]] = []
        while self.tokens[self.at].type != end:
            self.at += 1  # list_item_open
            item = self.blocks("list_item_close")
            if item:
                items.append(tuple(item))
            else:
                self.skip("item: no words")
        self.at += 1
        start = int(token.attrGet("start") if token.attrGet("start") is not None else 1) if ordered else 0
        return Items(ordered, start, tuple(items)) if items else None

    def table(self) -> Table | None:
        rows: list[list[Runs]] = []
        while (token := self.tokens[self.at]).type != "table_close":
            self.at += 1
            if token.type == "tr_open":
                rows.append([])
            elif token.type in ("th_open", "td_open"):
                runs = self.inline()
                if token.type == "th_open":
                    runs = merge_runs(replace(run, bold=False) for run in runs)  # headers are bold by themselves
                rows[-1].append(runs)
        self.at += 1
        if not any(cell for row in rows for cell in row):
            return self.skip("block: no words")
        return Table(tuple(rows[0]), tuple(map(tuple, rows[1:])))

    def inline(self) -> Runs:
        """The runs of the inline token at hand; goes on behind the closing token."""
        token = self.tokens[self.at]
        self.at += 2
        return writable(make_runs(_runs(token.children or [], self.foreign)))


def writable(runs: Runs) -> Runs:
    """``runs``, without emphasis when CommonMark cannot write it: then it is not to be shown either."""
    if any(run.bold or run.italic or run.struck for run in runs):
        (inline, *_) = _parser().parseInline(_inline(runs))
        if make_runs(_runs(inline.children or [], False)) != runs:
            return make_runs(Run(run.text, code=run.code, math=run.math) for run in runs)
    return runs


def _runs(tokens, foreign: bool) -> Iterator[Run]:
    depth = {"strong": 0, "em": 0, "s": 0}
    for token in tokens:
        kind, _, side = token.type.rpartition("_")
        style = {"bold": depth["strong"] > 0, "italic": depth["em"] > 0, "struck": depth["s"] > 0}
        if kind in depth:
            depth[kind] += 1 if side == "open" else -1
        elif token.type in ("text", "text_special"):
            yield Run(token.content, **style)
        elif token.type == "code_inline":
            yield Run(token.content, **style, code=True)
        elif token.type == "formula":
            if foreign and not _MATHEMATICAL.search(token.content):
                yield Run(f"${token.content}$", **style)
            else:
                yield Run(token.content, math=True)
        elif token.type in ("softbreak", "hardbreak") or re.match(r"<br\b", token.content, re.IGNORECASE):
            yield Run(" ", **style)


def make_runs(runs: Iterable[Run]) -> Runs:
    """Runs in the one spelling: characters normalised, emoji gone, single spaces, one run a style."""
    clean = []
    for run in runs:
        if run.math:
            clean.append(Run(normalize_formula(run.text), math=True))
        else:  # normalize_text would strip the spaces at both ends
            clean.append(replace(run, text=normalize_text(f"|{without_emoji(run.text)}|")[1:-1]))
    words = split_words(clean)
    return join_words([[run for run in word if run.text] for word in words if any(run.text for run in word)])


def make_code(lines: Iterable[str]) -> Code | None:
    """A block of code in the one spelling; None when nothing is left."""
    clean = []
    for line in lines:
        line = without_emoji(line.expandtabs(4))
        clean.append("".join(normalize_character(character) for character in line).rstrip())
    while clean and not clean[0]:
        clean.pop(0)
    while clean and not clean[-1]:
        clean.pop()
    return Code(tuple(clean)) if clean else None


def normalize_formula(latex: str) -> str:
    """LaTeX of a formula on one line with single spaces; comments taken away."""
    latex = re.sub(r"(?<!\\)%[^\n]*\n?", " ", latex)
    return re.sub(r"\s+", " ", latex).strip()


def without_emoji(text: str) -> str:
    """``text`` without pictographs, their modifiers, and control characters."""
    if text.isascii():
        return text
    return "".join(
        character
        for character in text
        if character < "\u2190"
        or character in "\u25cf\u25aa\u25cb"
        or unicodedata.category(character) not in ("So", "Sk", "Cs", "Co", "Cn", "Mn", "Me")
    )
