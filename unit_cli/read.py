"""`unit read PATH...`: the text of page pictures and PDFs."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack

from .common import CommandError, Progress, add_model_argument, complain, groups, load, positive
from .inputs import open_inputs

PAGES_AT_ONCE = 4  # whose chunks share batches; bounds the memory, and the wait for the first text


def add_parser(subparsers) -> None:
    """Add `read` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "read",
        help="read the text of page pictures and PDFs",
        description="Read page pictures and PDFs. A page is cut on white space into blocks in reading order.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image or PDF")
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "json"),
        default="text",
        help="markdown has headings, lists, code and tables; json has box, text and confidence of each block",
    )
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--batch-size", type=positive, default=16, help="pieces of pages read at once (default: 16)")
    parser.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="encode pieces of different sizes without padding (default: where the model can, as UNIT's do)",
    )
    parser.add_argument(
        "--looks",
        type=positive,
        metavar="N",
        help="how often a line is looked at that the first reading is not sure of, at most 6 (default: as the model "
        "was saved); 1 is fastest",
    )
    parser.add_argument(
        "--evidence",
        type=float,
        metavar="E",
        help="read nothing on a page with fewer letters, times the odds that one is right, than this: a picture, or "
        "stained paper (default: as the model was saved); 0 reads everything",
    )
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Read, print, and return 2 if any input was refused."""
    model, processor, name = load(args.model, args.device, "AutoModelForImageTextToText")
    from modeling_unit.reading_unit import Reader

    if not hasattr(model, "generate"):
        raise CommandError(f"{name}: this model cannot read: it has no language decoder")
    try:
        chosen = {"packed": args.packed, "looks": args.looks, "evidence": args.evidence}
        reader = Reader(model, processor, batch_size=args.batch_size, **chosen)
    except ValueError as error:  # more looks than there are, evidence below 0
        raise CommandError(str(error)) from error
    status = 0
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open(args.out, "w", encoding="utf-8")) if args.out else sys.stdout
        except OSError as error:
            raise CommandError(f"{args.out}: cannot be written ({error.strerror})") from error
        progress = stack.enter_context(Progress("reading", "chunk"))
        printer = {"text": _Text, "markdown": _Markdown, "json": _Json}[args.format](stream, name)
        for group in groups(open_inputs(args.paths), PAGES_AT_ONCE):
            for item in group:
                if item.error:
                    complain("read", item.error)
                    status = 2
                elif item.note:
                    complain("read", f"{item.name}: {item.note}")
            pages = iter(reader.read_many([item.image for item in group if item.image is not None], progress))
            for item in group:
                printer.add(item, next(pages) if item.image is not None else None)
        printer.close()
    return status


class _Text:
    """Texts one after another; a heading above each where there are several."""

    def __init__(self, stream, model: str):
        self.stream = stream
        self.first: tuple | None = None
        self.count = 0

    def add(self, item, page) -> None:
        if page is None:
            return
        self.count += 1
        if self.count == 1:
            # Whether it stays the only one is not known yet: a single page is printed bare.
            self.first = item, page
            return
        if self.first:
            self._print(*self.first)
            self.first = None
        self._print(item, page)

    def _print(self, item, page) -> None:
        print(f"{self.heading(item.name)}\n{self.content(page)}\n", file=self.stream, flush=True)

    def close(self) -> None:
        if self.first:
            print(self.content(self.first[1]), file=self.stream)

    def heading(self, name: str) -> str:
        return f"==> {name} <=="

    def content(self, page) -> str:
        return page.text


class _Markdown(_Text):
    """The same in Markdown, where a comment is what does not show."""

    def heading(self, name: str) -> str:
        return f"<!-- {name.replace('--', '- -')} -->\n"

    def content(self, page) -> str:
        return page.markdown


class _Json:
    """One object: `model`, and `pages` with either a page's content or an `error`."""

    def __init__(self, stream, model: str):
        self.stream, self.model, self.pages = stream, model, []

    def add(self, item, page) -> None:
        entry = {"file": item.path, "page": item.page}
        entry |= {"error": item.error} if page is None else page.to_dict()
        self.pages.append(entry)

    def close(self) -> None:
        json.dump({"model": self.model, "pages": self.pages}, self.stream, ensure_ascii=False, indent=1)
        print(file=self.stream)
