"""From users' PDFs to a data set: folders, archives, what is broken in them, and workers that are lost on the way."""

import errno
import gzip
import io
import json
import os
import signal
import struct
import tarfile
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.pdf_files import Page, prose, write_pdf
from training.data import heldout, line_cuts, pdf_build, pdf_sources
from training.data.line_cuts import LINES
from training.data.pdf_build import X_HEIGHTS, PageSettings, build_from_pdfs
from training.data.refusals import TooManyRefused
from training.data.schema import read_columns, validate_row
from unit_cli.__main__ import main

COLUMNS = ["image", "text", "task", "kind", "words", "char_boxes", "x_height", "source", "license", "split"]


def page(seed):
    return Page().lines(prose(5, seed, 80), 60, 100).lines(prose(4, seed + 1000, 80), 60, 190)


def document(seed, pages=2):
    return write_pdf([page(seed + 100 * number) for number in range(pages)])


def expected(seed):
    return "\n".join(prose(5, seed, 80) + prose(4, seed + 1000, 80))


def build(sources, out, settings=None, **options):
    sources = [str(source) for source in sources]
    return build_from_pdfs(sources, out, settings or PageSettings(), progress=False, **options)


def rows_of(folder):
    rows = list(read_columns(folder, COLUMNS))
    for row in rows:
        validate_row(row)
    return sorted(rows, key=lambda row: row["source"])


@pytest.fixture
def papers(tmp_path):
    """A folder with one PDF, another one deeper down, and what is no PDF."""
    folder = tmp_path / "papers"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.pdf").write_bytes(document(1))
    (folder / "deep" / "Two.PDF").write_bytes(document(2, pages=1))
    (folder / "notes.txt").write_text("no PDF")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No cache, no packages: users' folders need neither."""
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))

    def unreachable(*args, **kwargs):
        raise RuntimeError("could not download it")

    monkeypatch.setattr(pdf_sources, "fetch_deb", unreachable)
    monkeypatch.setattr(heldout, "validation_text_filter", unreachable)


# --------------------------------------------------------------------------------------------------------- sources


def test_a_folder_becomes_pages_with_their_text_and_boxes(papers, tmp_path):
    report = build([papers], tmp_path / "out", PageSettings(license="CC0-1.0", x_height=(8.0, 8.0)))
    rows = rows_of(tmp_path / "out")
    assert [row["source"] for row in rows] == ["papers/deep/Two.PDF#1", "papers/one.pdf#1", "papers/one.pdf#2"]
    assert [row["text"] for row in rows] == [expected(2), expected(1), expected(101)]
    for row in rows:
        assert (row["task"], row["kind"], row["license"], row["split"]) == ("ocr", "document", "CC0-1.0", "train")
        assert row["x_height"] == pytest.approx(8.0, rel=0.01)
        assert [word["text"] for word in row["words"]] == row["text"].split()
    assert (report.rows, report.pages, report.pages_used, report.documents) == (3, 3, 3, 2)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["settings"]["unit"] == "page"
    assert saved["settings"]["held_out_texts_left_out"] is False
    assert saved["refused"]["documents"][str(papers)] == {"accepted": 2, "refused": 0, "reasons": {}}


def archive_of(papers, path, kind):
    files = {f"set/{file.relative_to(papers)}": file.read_bytes() for file in papers.rglob("*") if file.is_file()}
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{kind}") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["zip", "", "gz", "bz2", "xz"])
def test_an_archive_is_read_like_a_folder(papers, tmp_path, kind):
    archive = archive_of(papers, tmp_path / "papers.archive", kind)
    build([archive], tmp_path / "out")
    build([papers], tmp_path / "plain")
    texts = [[row["text"] for row in rows_of(tmp_path / name)] for name in ("out", "plain")]
    assert texts[0] == texts[1]
    assert rows_of(tmp_path / "out")[0]["source"] == "papers.archive/set/deep/Two.PDF#1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "papers", "papers.archive", "plain"]


def test_names_in_an_archive_are_never_paths(tmp_path):
    content = document(3, pages=1)
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../escaped.pdf", "/tmp/absolute.pdf", "a\\..\\b\x07.pdf"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            content += b"\n"  # no copies
        for kind, name in ((tarfile.SYMTYPE, "link.pdf"), (tarfile.LNKTYPE, "hard.pdf"), (tarfile.FIFOTYPE, "p.pdf")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = set(tmp_path.parent.rglob("*.pdf"))
    build([tmp_path / "evil.tar"], tmp_path / "sub" / "out")
    assert set(tmp_path.parent.rglob("*.pdf")) == before
    names = [row["source"] for row in rows_of(tmp_path / "sub" / "out")]
    assert names == ["evil.tar/a/b?.pdf#1", "evil.tar/escaped.pdf#1", "evil.tar/tmp/absolute.pdf#1"]


def test_an_archive_that_grows_without_end_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf_sources, "FREE_GROWTH", 100_000)
    monkeypatch.setattr(pdf_sources, "MAX_GROWTH", 2)
    good = document(4, pages=1)
    with tarfile.open(tmp_path / "bomb.tgz", "w:gz") as archive:
        for name, content in (("good.pdf", good), ("zeros.bin", bytes(10_000_000)), ("late.pdf", good)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    report = build([tmp_path / "bomb.tgz"], tmp_path / "out", max_refused=1.0)
    assert [row["source"] for row in rows_of(tmp_path / "out")] == ["bomb.tgz/good.pdf#1"]
    (reason,) = report.refused["documents"][str(tmp_path / "bomb.tgz")]["reasons"]
    assert "grows beyond 2 times its size" in reason


def test_a_member_larger_than_its_zip_says_is_refused(tmp_path):
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("liar.pdf", bytes(100_000))
        archive.writestr("good.pdf", document(5, pages=1))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    assert struct.unpack_from("<I", content, entry + 24) == (100_000,)
    struct.pack_into("<I", content, entry + 24, 10)  # the size in the central directory
    path.write_bytes(content)
    report = build([path], tmp_path / "out", max_refused=1.0)
    assert [row["source"] for row in rows_of(tmp_path / "out")] == ["liar.zip/good.pdf#1"]
    assert sum(counts["refused"] for counts in report.refused["documents"].values()) == 1


def test_members_behind_a_password_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(("locked.pdf", "damaged.pdf", "good.pdf")):
            archive.writestr(name, document(10 + number, pages=1))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    struct.pack_into("<H", content, entry + 8, 1)  # encrypted, says the flag
    struct.pack_into("<H", content, content.index(b"PK\x03\x04") + 6, 1)
    at = content.index(b"damaged.pdf") + 200
    content[at] ^= 0xFF
    path.write_bytes(content)
    report = build([path], tmp_path / "out", max_refused=1.0)
    assert [row["source"] for row in rows_of(tmp_path / "out")] == ["some.zip/good.pdf#1"]
    reasons = report.refused["documents"][str(path)]["reasons"]
    assert {reason: each["count"] for reason, each in reasons.items()} == {
        "archive: a member is encrypted": 1,
        "archive: a member is damaged": 1,
    }


def test_headers_of_an_archive_are_bounded_too(tmp_path):
    with tarfile.open(tmp_path / "header.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, comment in (("good.pdf", "short"), ("late.pdf", "x" * 2_000_000)):
            info = tarfile.TarInfo(name)
            content = document(6, pages=1)
            info.size, info.pax_headers = len(content), {"comment": comment}
            archive.addfile(info, io.BytesIO(content))
    report = build([tmp_path / "header.tar"], tmp_path / "out", max_refused=1.0)
    assert report.rows == 1
    (reason,) = report.refused["documents"][str(tmp_path / "header.tar")]["reasons"]
    assert "breaks off" in reason


def test_a_truncated_archive_gives_what_it_still_holds(papers, tmp_path):
    archive = archive_of(papers, tmp_path / "a.tgz", "gz")
    content = archive.read_bytes()
    plain = gzip.decompress(content)
    archive.write_bytes(gzip.compress(plain[: len(plain) // 2])[:-20])
    with pytest.raises(ValueError, match=r"no PDF that can be used|none of the") as error:
        build([archive], tmp_path / "out")
    assert "breaks off" in str(error.value)


def test_a_debian_package_is_named_and_licensed_as_such(papers, tmp_path, monkeypatch):
    (papers / "link.pdf").symlink_to(papers / "one.pdf")
    monkeypatch.setattr(pdf_sources, "fetch_deb", lambda name: papers)
    build(["texlive-some-doc"], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["source"] for row in rows] == ["texlive-some-doc/one.pdf#1", "texlive-some-doc/one.pdf#2"]
    assert {row["license"] for row in rows} == {"as its TeX Live package (LPPL or another free licence)"}


def test_what_is_no_source_is_said_in_one_line(tmp_path):
    (tmp_path / "text.txt").write_text("nothing")
    for source, message in (
        (tmp_path / "text.txt", "is no PDF, zip or tar file"),
        (tmp_path / "nowhere", "no file or folder"),
        ("Papers 2024", "not the name of a Debian package"),
        ("no-such-package", "no file or folder no-such-package, and as a Debian package: could not download"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            build([source], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no PDF that can be used\. No file there ends in \.pdf"):
        build([tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("unit", ["page", "block", "line", "chunk"])
def test_the_number_of_workers_changes_nothing(papers, tmp_path, unit):
    (papers / "more.pdf").write_bytes(document(20, pages=9))  # more than a task has
    settings = PageSettings(unit=unit, x_height=(6.0, 9.0), seed=5)
    for workers in (1, 2):
        build([papers], tmp_path / f"out{workers}", settings, workers=workers)
    one, two = ((tmp_path / f"out{n}" / "part-00000.parquet").read_bytes() for n in (1, 2))
    assert one == two
    build([papers], tmp_path / "other", PageSettings(unit=unit, x_height=(6.0, 9.0), seed=6))
    assert one != (tmp_path / "other" / "part-00000.parquet").read_bytes()


def test_blocks_are_the_paragraphs(papers, tmp_path):
    build([papers / "one.pdf"], tmp_path / "out", PageSettings(unit="block", x_height=(8.0, 8.0)))
    texts = [row["text"] for row in read_columns(tmp_path / "out", ["text"])]
    assert texts == ["\n".join(prose(*each, 80)) for each in ((5, 1), (4, 1001), (5, 101), (4, 1101))]


def picture_of(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_lines_are_strips_of_one_printed_line_each(papers, tmp_path):
    settings = PageSettings(unit="line", x_height=(8.0, 8.0), license="CC0-1.0", split="validation")
    report = build([papers], tmp_path / "out", settings)
    rows = rows_of(tmp_path / "out")
    printed = {
        source: set(expected(seed).split("\n"))
        for source, seed in (("papers/deep/Two.PDF#1", 2), ("papers/one.pdf#1", 1), ("papers/one.pdf#2", 101))
    }
    for row in rows:
        assert row["text"] in printed[row["source"]]
        assert (row["license"], row["split"]) == ("CC0-1.0", "validation")
        assert [word["text"] for word in row["words"]] == row["text"].split()
        picture = picture_of(row)
        assert picture.shape[0] == LINES.line_height
        # the page's x-height of 8 px has become that of the strip, and its letters lie within their words' boxes
        assert row["x_height"] == pytest.approx(LINES.x_height, rel=0.1)
        covered = np.zeros(picture.shape[1], dtype=bool)
        for word in row["words"]:
            covered[max(word["box"][0] - 1, 0) : word["box"][2] + 1] = True
        assert picture[:, ~covered].min(initial=255) > 100
        assert all(picture[:, word["box"][0] : word["box"][2]].min() < 100 for word in row["words"])
    assert (report.rows, report.pages_used, report.documents) == (len(rows), 3, 2)
    assert len({(row["source"], row["text"]) for row in rows}) == len(rows) >= 24  # of 27; none twice
    assert report.rows + sum(report.left_out.values()) == 27
    assert all(reason.startswith("line: ") for reason in report.left_out)


def test_pages_of_lines_are_drawn_at_sizes_of_the_range(papers, tmp_path, monkeypatch):
    """Small type is enlarged in the cutting, so that the rows do not show the size at which a page was drawn."""
    drawn = []
    render = line_cuts.render_page
    monkeypatch.setattr(
        line_cuts, "render_page", lambda page, text, size: drawn.append(size) or render(page, text, size)
    )
    monkeypatch.setattr(
        pdf_build, "run_guarded", lambda work, tasks, **_: closable((task, work(task)) for task in tasks)
    )
    (papers / "more.pdf").write_bytes(document(20, pages=9))
    build([papers], tmp_path / "out", PageSettings(unit="line", x_height=(4.0, 6.0)))
    assert len(drawn) == len(set(drawn)) == 12
    assert 4.0 <= min(drawn) < 5.0 < max(drawn) <= 6.0
    drawn.clear()
    build([papers], tmp_path / "same", PageSettings(unit="line", x_height=X_HEIGHTS["line"]))
    assert max(drawn) / min(drawn) > 1.5
    assert 2.8 <= min(drawn) < max(drawn) <= 15.0


def closable(results):
    yield from results


def test_lines_in_other_languages_and_what_is_held_out(papers, tmp_path):
    german = ["Über die Straße läuft ein großer Hund und bellt", "während der Bäcker die Brötchen aus dem Ofen holt"]
    (tmp_path / "german.pdf").write_bytes(write_pdf([Page().lines(german * 3, 60, 100, 20.0)]))
    settings = PageSettings(unit="line", x_height=(8.0, 8.0))
    with pytest.raises(ValueError, match="none of the 1 pages gave a row; left out: page: not English 1"):
        build([tmp_path / "german.pdf"], tmp_path / "out", settings)
    build([tmp_path / "german.pdf"], tmp_path / "out", replace(settings, english=False))
    assert {row["text"] for row in rows_of(tmp_path / "out")} == set(german)
    first = expected(2).split("\n")[0]
    report = build([papers], tmp_path / "rest", settings, unwanted=lambda text: text == first)
    assert report.left_out["line: held out"] == 1
    assert first not in {row["text"] for row in rows_of(tmp_path / "rest")}


def test_paragraphs_are_joined_when_asked(papers, tmp_path):
    build([papers / "one.pdf"], tmp_path / "out", PageSettings(joined=True))
    first = rows_of(tmp_path / "out")[0]["text"]
    assert first == " ".join(prose(5, 1, 80)) + "\n" + " ".join(prose(4, 1001, 80))


def test_pages_and_rows_are_capped_by_the_seed(papers, tmp_path):
    (papers / "long.pdf").write_bytes(document(30, pages=30))
    assert build([papers], tmp_path / "a", pages_per_pdf=4).pages == 4 + 2 + 1
    assert build([papers], tmp_path / "b", max_pages=5).pages == 5
    assert build([papers], tmp_path / "c", max_rows=3).rows == 3


def test_copies_are_left_out_and_counted(papers, tmp_path):
    (papers / "copy.pdf").write_bytes((papers / "one.pdf").read_bytes())
    report = build([papers], tmp_path / "out")
    assert (report.documents, report.copies, report.rows) == (2, 1, 3)


def test_unwanted_text_is_left_out(papers, tmp_path):
    report = build([papers], tmp_path / "out", unwanted=lambda text: text == expected(2))
    assert report.rows == 2
    assert report.left_out == {"page: held out": 1}


def test_settings_that_cannot_be_meant(papers, tmp_path):
    for settings, message in (
        (PageSettings(unit="word"), "unit must be"),
        (PageSettings(x_height=(9.0, 5.0)), "x-height"),
        (PageSettings(x_height=(0.0, 5.0)), "x-height"),
        (PageSettings(unit="chunk", joined=True), "chunks"),
        (PageSettings(unit="line", joined=True), "lines are"),
        (PageSettings(unit="line", furniture=False), "lines are"),
    ):
        with pytest.raises(ValueError, match=message):
            build([papers], tmp_path / "out", settings)


# ------------------------------------------------------------------------------------------------------- bad input


def test_every_broken_document_is_counted_with_its_reason(papers, tmp_path):
    good = document(40)
    files = {
        "corrupt.pdf": b"%PDF-1.5 and no more",
        "empty.pdf": b"",
        "truncated.pdf": good[: len(good) // 3],
        "encrypted.pdf": write_pdf([page(41)], encrypted=True),
        "none.pdf": write_pdf([]),
    }
    for name, content in files.items():
        (papers / name).write_bytes(content)
    report = build([papers], tmp_path / "out", max_refused=1.0)
    assert report.rows == 3
    counts = report.refused["documents"][str(papers)]
    assert (counts["accepted"], counts["refused"]) == (2, 5)
    found = {reason: each["count"] for reason, each in counts["reasons"].items()}
    assert found == {"document: encrypted": 1, "document: corrupt or without pages": 4}
    assert "5 of 7 documents refused" in str(report)


def test_broken_pages_are_counted_and_unsuitable_ones_left_out(tmp_path):
    nameless = Page().lines(prose(5, 50, 80), 60, 100)
    nameless.operators.append("BT /F1 10 Tf 60 500 Td (" + "\\001\\003\\004" * 30 + ") Tj ET")
    pages = [
        page(51),
        Page((20, 800)).lines(prose(9, 52, 80), 1, 100),
        Page((20000, 800)).lines(prose(9, 53, 80), 60, 100),
        Page(),
        nameless,
    ]
    (tmp_path / "some.pdf").write_bytes(write_pdf(pages))
    report = build([tmp_path / "some.pdf"], tmp_path / "out", max_refused=1.0)
    assert report.rows == 1
    reasons = report.refused["pages"][str(tmp_path / "some.pdf")]["reasons"]
    assert reasons["page: size"]["count"] == 2
    assert sum(each["count"] for each in reasons.values()) + report.left_out.total() == 4
    assert report.left_out["page: little text"] >= 1


@pytest.mark.parametrize(("claim", "pages"), [(b"999999999", 1), (b"-5", 1), (b"30000", None)])
def test_a_count_of_pages_that_is_a_lie_is_seen_through(tmp_path, claim, pages):
    path = tmp_path / "liar.pdf"
    path.write_bytes(document(70, pages=1).replace(b"/Count 1", b"/Count " + claim))
    result = pdf_sources.check_document(pdf_sources.Document("here", "liar.pdf", path))
    if pages is None:
        assert (result.reason, result.detail) == ("refused", "more than 20000 pages")
    else:
        assert result[1] == pages


def test_a_full_disk_ends_the_run_and_leaves_nothing(papers, tmp_path, monkeypatch):
    archive = archive_of(papers, tmp_path / "a.zip", "zip")

    def full(file, target, limit):
        target.write_bytes(b"%PDF")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pdf_sources, "_copy", full)
    with pytest.raises(OSError, match="No space left"):
        build([archive], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "papers"]


def test_too_much_that_is_broken_stops_the_run_and_names_it(papers, tmp_path):
    build([papers], tmp_path / "out")
    before = (tmp_path / "out" / "part-00000.parquet").read_bytes()
    for number in range(200):
        (papers / f"bad{number:03d}.pdf").write_bytes(b"%PDF-1.5 " + str(number).encode())
    with pytest.raises(
        TooManyRefused, match=r"document: corrupt or without pages \(\d+ times, e.g. papers/bad000.pdf\)"
    ):
        build([papers], tmp_path / "out")
    assert (tmp_path / "out" / "part-00000.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "papers"]


def test_no_row_at_all_is_an_error_and_keeps_what_was_there(papers, tmp_path):
    build([papers], tmp_path / "out")
    (tmp_path / "blank.pdf").write_bytes(write_pdf([Page(), Page()]))
    with pytest.raises(ValueError, match="none of the 2 pages gave a row; left out: page: little text 2"):
        build([tmp_path / "blank.pdf"], tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("fate", "reason"), [("crash", "crashes the reader"), ("hang", "takes too long")])
def test_a_document_that_takes_its_worker_along_costs_only_itself(
    papers, tmp_path, monkeypatch, fate, reason, workers
):
    read_task = pdf_build.read_task
    (papers / "bad.pdf").write_bytes(document(60, pages=20))
    monkeypatch.setattr(pdf_build, "DOCUMENT_SECONDS", 0.5)
    monkeypatch.setattr(pdf_build, "PAGE_SECONDS", 0.1 if fate == "hang" else 5.0)

    def read(task, *rest):
        if task.document.path.name == "bad.pdf" and 3 in task.pages:
            if fate == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        return read_task(task, *rest)

    monkeypatch.setattr(pdf_build, "read_task", read)
    report = build([papers], tmp_path / "out", workers=workers, max_refused=1.0)
    sources = {row["source"] for row in rows_of(tmp_path / "out")}
    assert {"papers/one.pdf#1", "papers/one.pdf#2", "papers/deep/Two.PDF#1"} <= sources
    assert "papers/bad.pdf#4" not in sources
    (counts,) = report.refused["pages"].values()
    assert list(counts["reasons"]) == [f"document: {reason}"]
    assert counts["reasons"][f"document: {reason}"]["examples"][0].startswith("papers/bad.pdf#1-8")


def test_a_worker_killed_from_outside_loses_nothing(papers, tmp_path, monkeypatch):
    read_task = pdf_build.read_task
    flag = tmp_path / "killed"
    build([papers], tmp_path / "plain")

    def read(task, *rest):
        if not flag.exists():
            flag.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return read_task(task, *rest)

    monkeypatch.setattr(pdf_build, "read_task", read)
    report = build([papers], tmp_path / "out")
    assert flag.exists()
    assert report.refused["pages"][str(papers)]["refused"] == 0
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "plain")


# --------------------------------------------------------------------------------------------------- command line


def run_cli(*arguments):
    return main(["data", "from-pdfs", *map(str, arguments)])


def test_the_command_builds_a_set_from_a_folder(papers, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_cli(papers, "--unit", "block", "--x-height", "8-12", "--source-name", "mine", "--out", out) == 0
    assert f"{out}: 6 rows from 3 of 3 pages of 2 documents" in capsys.readouterr().out
    rows = rows_of(out)
    assert {row["source"] for row in rows} == {"mine/one.pdf#1", "mine/one.pdf#2", "mine/deep/Two.PDF#1"}
    assert all(7.9 <= row["x_height"] <= 12.1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out FOLDER is needed"),
        (["--out", "x", "--name", "y"], "--name is for the sets of the recipes"),
        (["--out", "x", "--unit", "chunk", "--all-languages"], "chunks are printed lines"),
        (["--out", "x", "--unit", "line", "--text", "paragraphs"], "lines are all printed lines of a page"),
        (["--out", "x", "--unit", "line", "--drop-headers"], "lines are all printed lines of a page"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(papers, capsys, arguments, message):
    assert run_cli(papers, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_command_builds_lines_without_what_is_held_out(papers, tmp_path, monkeypatch, capsys):
    held = expected(1).split("\n")
    monkeypatch.setattr(heldout, "validation_text_filter", lambda: held.__contains__)
    arguments = ["--unit", "line", "--x-height", 7, "--all-languages", "--leave-out-held-out", "--rows", 15]
    assert run_cli(papers, *arguments, "--out", tmp_path / "out") == 0
    assert f"{tmp_path / 'out'}: 15 rows from" in capsys.readouterr().out
    texts = {row["text"] for row in rows_of(tmp_path / "out")}
    assert texts <= {*expected(2).split("\n"), *expected(101).split("\n")}
    saved = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert (saved["unit"], saved["english"], saved["x_height"]) == ("line", False, [7.0, 7.0])
    assert saved["held_out_texts_left_out"] is True


def test_a_held_out_package_is_refused_for_training(tmp_path, capsys):
    assert run_cli("texlive-metapost-doc", "--out", tmp_path / "out") == 2
    assert "held out" in capsys.readouterr().err
