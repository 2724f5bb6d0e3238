"""Pages to chunks: characters by hand where the rule is about characters, drawn PDFs where it is about ink."""

from collections import Counter

import numpy as np
import pypdfium2 as pdfium
import pytest
from PIL import ImageFont

skia = pytest.importorskip("skia")

from training.data import heldout, pdf  # noqa: E402
from training.data.schema import read_columns, validate_row  # noqa: E402

PROSE = (
    "It is not the case that a page of text",
    "can be read by one who has never seen",
    "any of the letters that are used for it,",
    "but there are more ways to learn than",
    "those which we have been shown at first.",
)
SIZE = 12.0
PITCH = 16.0


@pytest.fixture(scope="module")
def typeface(tmp_path_factory):
    path = tmp_path_factory.mktemp("font") / "aileron.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)  # the font that Pillow carries
    return skia.Typeface.MakeFromFile(str(path))


def draw_pdf(path, typeface, draw, pages=1):
    """A PDF of A4 pages; ``draw(canvas, write, number)`` where ``write(text, x, baseline, size)``."""
    stream = skia.FILEWStream(str(path))
    with skia.PDF.MakeDocument(stream) as document:
        for number in range(pages):
            with document.page(595, 842) as canvas:

                def write(text, x, baseline, size=SIZE, canvas=canvas):
                    canvas.drawString(text, x, baseline, skia.Font(typeface, size), skia.Paint(AntiAlias=True))

                draw(canvas, write, number)
    stream.flush()
    del stream
    return path


def paragraph(write, lines=PROSE, x=72.0, y=100.0):
    for number, line in enumerate(lines):
        write(line, x, y + PITCH * number)


def open_page(path, number=0):
    return pdfium.PdfDocument(path)[number]


def rng():
    return np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------- characters by hand


def glyphs_of(text, *, spaces=True, gap=4.0, widths=None, baselines=None):
    """Characters 5 wide and 5 high (7 for others than x-height letters), 1 apart, on baseline 100."""
    codes, boxes, lines, spaced = [], [], [], []
    x, space = 10.0, True
    for character in text:
        if character == " ":
            x, space = x + gap, True
            continue
        height = 5.0 if character in pdf.X_HEIGHT_LETTERS else 7.0
        base = 100.0 if baselines is None else baselines[len(codes)]
        codes.append(ord(character))
        boxes.append((x, base - height, x + 5.0, base))
        lines.append(base)
        spaced.append(space and spaces)
        x, space = x + 6.0, False
    return pdf.Glyphs(codes, np.array(boxes), np.array(lines), spaced, [True] * len(codes), 600, 800)


def only_line(glyphs):
    (line,) = pdf.find_lines(glyphs)
    return line


def test_a_line_is_its_characters_with_one_box_each():
    line = only_line(glyphs_of("one sum"))
    assert (line.text, line.refused, line.x_height) == ("one sum", "", 5.0)
    assert line.boxes[0].tolist() == [10, 95, 15, 100]
    assert line.boxes[3].tolist() == [0, 0, 0, 0]  # the space
    assert line.boxes[4].tolist() == [32, 95, 37, 100]  # 3 characters of 6 and a gap of 4 further on


def test_a_wide_gap_is_a_space_though_the_text_layer_has_none():
    # A gap of 1 + 7 points is 1.6 x-heights.
    assert only_line(glyphs_of("one sum", spaces=False, gap=7.0)).text == "one sum"
    assert only_line(glyphs_of("one sum", spaces=False, gap=2.0)).text == "onesum"


def test_a_space_that_cannot_be_seen_is_none():
    assert only_line(glyphs_of("wo rd", gap=0.0)).text == "word"


def test_a_column_gap_ends_the_line():
    # 3 x-heights are 15 points.
    assert [line.text for line in pdf.find_lines(glyphs_of("one sum", gap=16.0))] == ["one", "sum"]


@pytest.mark.parametrize("code", [0x02, 0xAD, 0xFFFE])
def test_a_soft_hyphen_is_the_hyphen_one_sees(code):
    assert only_line(glyphs_of("recog" + chr(code))).text == "recog-"


def test_a_ligature_becomes_letters_that_share_its_box():
    line = only_line(glyphs_of("e\ufb03xe"))
    assert line.text == "effixe"
    widths = (line.boxes[:, 2] - line.boxes[:, 0]).tolist()
    assert widths == pytest.approx([5, 5 / 3, 5 / 3, 5 / 3, 5, 5])
    assert line.boxes[1][0] == 16
    assert line.boxes[3][2] == 21


def test_letters_that_the_pdf_puts_in_one_box_share_it():
    glyphs = glyphs_of("exfixe")
    glyphs.boxes[3] = glyphs.boxes[2]
    glyphs.boxes[4:, 0::2] -= 6.0  # the letters after it close up
    line = only_line(glyphs)
    assert line.text == "exfixe"
    assert line.boxes[2].tolist() == [22, 93, 24.5, 100]
    assert line.boxes[3].tolist() == [24.5, 93, 27, 100]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("some \ue000 here", "no unicode"),
        ("some \ufffd here", "no unicode"),
        ("so \u03b1 = some", "symbols"),
        ("x+y=(a*b)/[c-2]", "few letters"),
        ("a b c some d e", "single letters"),
        ("Some more . . . . . . 5", "single letters"),
        ("17", "no letters"),
        ("some \u00e9\u00e8\u00e0s", "symbols"),  # more accented letters than English has
    ],
)
def test_what_is_no_line_of_text_is_refused(text, reason):
    assert only_line(glyphs_of(text)).refused == reason


def test_one_accented_letter_is_english_enough():
    assert only_line(glyphs_of("cafe caf\u00e9")).text == "cafe caf\u00e9"


def test_a_superscript_stays_in_its_line_and_a_formula_is_refused():
    flat = [100.0] * 12
    raised = flat[:11] + [96.0]
    assert only_line(glyphs_of("some more 5n2x", baselines=raised)).refused == ""
    jumping = [100.0, 96.0] * 6
    assert only_line(glyphs_of("some more 5n2x", baselines=jumping)).refused == "baselines"


def test_an_accent_printed_over_a_letter_is_refused():
    glyphs = glyphs_of("nai\u00a8ve")
    glyphs.boxes[3] = glyphs.boxes[2] + (0.5, -3, 0.5, -5)
    assert only_line(glyphs).refused == "overprinted"


def line_at(y, *, x=(10.0, 200.0), x_height=5.0, refused=""):
    return pdf.Line(0, 1, (x[0], y - 7, x[1], y), y, x_height, "text", np.zeros((4, 4)), refused)


@pytest.mark.parametrize(
    ("lines", "lengths"),
    [
        ([line_at(100), line_at(112), line_at(124)], [3]),
        ([line_at(100), line_at(112), line_at(130)], [2, 1]),  # the pitch changes
        ([line_at(100), line_at(140)], [1, 1]),  # too far
        ([line_at(100), line_at(112, x_height=6.5)], [1, 1]),  # another size
        ([line_at(100), line_at(112, refused="symbols"), line_at(124)], [1, 1]),  # something between
        ([line_at(100, x=(10, 100)), line_at(100, x=(150, 240)), line_at(112, x=(10, 100))], [2, 1]),  # two columns
    ],
)
def test_lines_chain_to_paragraphs(lines, lengths):
    assert sorted(map(len, pdf.chain_lines(lines)), reverse=True) == lengths


def test_a_paragraph_ends_short_and_begins_indented():
    chain = [
        line_at(100),
        line_at(112),
        line_at(124, x=(10, 60)),
        line_at(136),
        line_at(148, x=(30, 200)),
        line_at(160),
    ]
    assert [len(part) for part in pdf.split_paragraphs(chain)] == [3, 1, 2]


def test_english_is_told_from_german_and_from_code():
    assert pdf.is_english(PROSE)
    german = [
        "Das ist nicht die Art, mit der eine Seite auf den Tisch gelegt wird, und von der Hand in den Mund",
        "zu leben",
    ]
    assert not pdf.is_english(german)
    assert not pdf.is_english([r"\def\foo{bar} \let\baz\qux \newcommand\quux{corge} \hbox\vbox\vskip\hskip"] * 4)
    assert not pdf.is_english(["Too short to say"])


# ---------------------------------------------------------------------------------------------------- ink of pages


def test_ink_is_compared_with_boxes():
    pixels = np.full((20, 60), 250, dtype=np.uint8)
    boxes = np.array([[5, 5, 10, 15], [12, 5, 17, 15]])
    pixels[5:15, 5:10] = pixels[5:15, 12:17] = 10
    assert pdf.ink_fault(pixels, boxes) == ""
    spot = pixels.copy()
    spot[8:12, 40:44] = 0
    assert pdf.ink_fault(spot, boxes) == "foreign ink"
    rule = pixels.copy()
    rule[18, 2:58] = 0
    assert pdf.ink_fault(rule, boxes) == "rule"
    assert pdf.ink_fault(pixels, np.array([[5, 5, 10, 15], [12, 5, 17, 15], [30, 5, 35, 15]])) == "missing ink"
    assert pdf.ink_fault(np.where(pixels < 100, 200, 250).astype(np.uint8), boxes) == "faint"


def test_a_drawn_page_is_read_to_the_letter(tmp_path, typeface):
    page = open_page(draw_pdf(tmp_path / "a.pdf", typeface, lambda canvas, write, n: paragraph(write)))
    lines = pdf.find_lines(pdf.read_glyphs(page))
    assert [line.text for line in lines] == list(PROSE)
    assert [line.baseline for line in lines] == pytest.approx([100, 116, 132, 148, 164], abs=0.1)
    font = skia.Font(typeface, 1000.0)
    x_height = font.getBounds(font.textToGlyphs("x"))[0].height() * SIZE / 1000
    # The median letter is a round one, which overshoots both lines by a few hundredths.
    assert x_height <= lines[0].x_height <= 1.08 * x_height
    assert [len(chain) for chain in pdf.chain_lines(lines)] == [5]


def test_chunks_hold_each_line_once_and_nothing_of_their_neighbours(tmp_path, typeface):
    page = open_page(draw_pdf(tmp_path / "a.pdf", typeface, lambda canvas, write, n: paragraph(write)))
    for seed in range(5):
        refusals = Counter()
        chunks = list(pdf.chunks_of_page(page, np.random.default_rng(seed), refusals))
        assert chunks
        assert not refusals
        for chunk in chunks:
            height, width = chunk.pixels.shape
            assert width * height <= 65536
            assert width <= 1024
            assert 6.5 < chunk.x_height < 13.5
            assert len(chunk.boxes) == len(chunk.text)
            visible = np.array([not character.isspace() for character in chunk.text])
            assert (chunk.boxes[~visible] == 0).all()
            # All ink lies in the boxes, and every box has ink.
            assert pdf.ink_fault(chunk.pixels, chunk.boxes[visible]) == ""
        lines = [line for chunk in chunks for line in chunk.text.split("\n")]
        whole = [line for line in lines if line in PROSE]
        assert len(whole) == len(set(whole))
        assert all(any(line in printed for printed in PROSE) for line in lines)  # a line may be cut short at a space
        assert len(lines) == len(PROSE)


def test_two_columns_stay_apart(tmp_path, typeface):
    def draw(canvas, write, number):
        paragraph(write, PROSE, x=40)
        paragraph(write, PROSE[::-1], x=320)

    page = open_page(draw_pdf(tmp_path / "a.pdf", typeface, draw))
    chains = pdf.chain_lines(pdf.find_lines(pdf.read_glyphs(page)))
    assert sorted([line.text for line in chain] for chain in chains) == sorted([list(PROSE), list(PROSE[::-1])])


@pytest.mark.parametrize("degrees", [2, 30, 90])
def test_text_that_is_turned_or_crossed_out_is_left_alone(tmp_path, typeface, degrees):
    def draw(canvas, write, number):
        paragraph(write)
        canvas.drawRect(skia.Rect(72, 128, 100, 134), skia.Paint())  # a bar over the third line
        canvas.save()
        canvas.rotate(degrees, 300, 400)
        write("this text is not upright at all", 300, 400)
        canvas.restore()

    page = open_page(draw_pdf(tmp_path / "a.pdf", typeface, draw))
    refusals = Counter()
    text = "\n".join(chunk.text for chunk in pdf.chunks_of_page(page, rng(), refusals))
    assert "upright" not in text
    assert "any of the letters" not in text
    if degrees == 2:  # steeper, and the letters do not even make a line
        assert refusals["line: not upright"] == 1


def test_other_pages_are_refused_with_a_reason(tmp_path, typeface):
    def draw(canvas, write, number):
        if number == 0:
            write("Nearly empty", 72, 100)
        elif number == 1:
            for line in range(9):
                write("Der Hund und die Katze sind nicht auf dem Dach", 72, 100 + PITCH * line)

    path = draw_pdf(tmp_path / "a.pdf", typeface, draw, pages=2)
    refusals = Counter()
    assert not [
        *pdf.chunks_of_page(open_page(path, 0), rng(), refusals),
        *pdf.chunks_of_page(open_page(path, 1), rng(), refusals),
    ]
    assert refusals == {"page: little text": 1, "page: not English": 1}
    with pytest.raises(ValueError, match="more than 5 characters"):
        pdf.read_glyphs(open_page(path, 0), most=5)


def test_a_block_is_a_whole_paragraph_at_the_size_asked_for(tmp_path, typeface):
    def draw(canvas, write, number):
        paragraph(write)
        paragraph(write, ["Two lines that are", "not fifteen words"], y=300)

    page = open_page(draw_pdf(tmp_path / "a.pdf", typeface, draw))
    for seed in range(4):
        (block,) = pdf.blocks_of_page(page, np.random.default_rng(seed), Counter())
        assert block.text == "\n".join(PROSE)
        assert 7.6 < block.x_height < 14.4


# ------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def packages(tmp_path, monkeypatch, typeface):
    """Two packages in a cache of the test's own: one for training, one held out, which share a paragraph."""
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    shared = (
        "This paragraph stands in the manuals of both",
        "of them and is what they say on copying and",
        "on the terms that you have to abide by then.",
    )
    own = ("Held out is what we do not learn from, so", "that we can see what we have learned at all.")
    for name, others in (("open-doc", PROSE), ("closed-doc", own)):
        folder = tmp_path / "cache" / "trees" / name
        folder.mkdir(parents=True)

        def draw(canvas, write, number, others=others):
            paragraph(write, shared, y=100)
            paragraph(write, others, y=300)

        draw_pdf(folder / "manual.pdf", typeface, draw, pages=4)
        (folder / "broken.pdf").write_bytes(b"%PDF-1.5 and no more")
    monkeypatch.setattr(heldout, "validation_packages", lambda: ["closed-doc"])
    listed = {**heldout.heldout(), "markdown": {"packages": []}}
    monkeypatch.setattr(heldout, "heldout", lambda: listed)
    return tmp_path


def texts(folder):
    return [row["text"] for row in read_columns(folder, ["text"])]


def test_the_number_of_workers_changes_nothing(packages):
    options = {"seed": 3, "progress": False}
    report = pdf.build_chunks(["open-doc"], packages / "one", workers=1, **options)
    pdf.build_chunks(["open-doc"], packages / "two", workers=2, **options)
    columns = ["image", "text", "char_boxes", "source"]
    one = list(read_columns(packages / "one", columns))
    assert one == list(read_columns(packages / "two", columns))
    assert report.rows == len(one) > 8
    assert report.pages == 4
    assert report.documents == 1
    pdf.build_chunks(["open-doc"], packages / "three", **(options | {"seed": 4}))
    assert one != list(read_columns(packages / "three", columns))


def test_rows_are_valid_and_say_where_they_come_from(packages):
    pdf.build_chunks(["open-doc"], packages / "out", seed=0, max_rows=3, progress=False)
    rows = list(
        read_columns(
            packages / "out",
            list(pdf.make_row.__kwdefaults__) + ["image", "text", "task", "kind", "source", "license", "split"],
        )
    )
    assert len(rows) == 3
    for row in rows:
        validate_row(row)
        assert row["source"].startswith("open-doc/manual.pdf#")
        assert (row["task"], row["kind"], row["split"]) == ("ocr", "document", "train")


def test_pages_are_capped_for_each_document_and_in_all(packages):
    assert pdf.list_documents("open-doc") == [("manual.pdf", 4)]  # the broken one is left out
    assert sum(len(task.pages) for task in pdf.plan_pages(["open-doc", "closed-doc"], 0, None, 2, "train")) == 4
    assert sum(len(task.pages) for task in pdf.plan_pages(["open-doc", "closed-doc"], 0, 3, 4, "train")) == 3


def test_a_list_of_documents_chooses_among_them(packages, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("# the one with text\n\nopen-doc/manual.pdf  # four pages\n")
    documents = pdf.read_document_list(listing)
    assert documents == {"open-doc/manual.pdf"}
    tasks = pdf.plan_pages(["open-doc", "closed-doc"], 0, None, 9, "train", documents)
    assert {f"{task.package}/{task.document}" for task in tasks} == documents
    with pytest.raises(ValueError, match=r"absent\.pdf"):
        pdf.plan_pages(["open-doc"], 0, None, 9, "train", frozenset(["open-doc/absent.pdf"]))
    with pytest.raises(ValueError, match="no list"):
        pdf.read_document_list(tmp_path / "nowhere.txt")
    listing.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no document"):
        pdf.read_document_list(listing)


def test_training_makes_way_for_the_text_of_the_validation_packages(packages):
    unwanted = heldout.validation_text_filter(progress=False)
    report = pdf.build_chunks(["open-doc"], packages / "a-train", seed=0, unwanted=unwanted, progress=False)
    assert report.refusals["chunk: held out"] > 0
    assert "abide" not in " ".join(texts(packages / "a-train"))
    assert "page of text" in " ".join(texts(packages / "a-train"))
    pdf.build_blocks(["closed-doc"], packages / "b-validation", seed=0, progress=False)
    assert "abide" in " ".join(texts(packages / "b-validation"))
    assert heldout.find_leaks([packages / "a-train"], [packages / "b-validation"], progress=False) == []


def test_leaks_are_found(packages):
    pdf.build_chunks(["open-doc"], packages / "a-train", seed=0, progress=False)
    pdf.build_blocks(["closed-doc"], packages / "b-validation", seed=0, progress=False)
    found = heldout.find_leaks([packages / "a-train"], [packages / "b-validation"], progress=False)
    assert found
    assert all("shares text with closed-doc/manual.pdf#" in line for line in found)
    pdf.build_chunks(["closed-doc"], packages / "c-train", seed=0, progress=False)
    found = heldout.find_leaks([packages / "c-train"], [packages / "b-validation"], progress=False)
    assert len(found) == len(texts(packages / "c-train"))
    assert all("held-out package" in line for line in found)


def test_a_held_out_package_is_refused_for_training():
    with pytest.raises(ValueError, match="texlive-metapost-doc: held out"):
        heldout.refuse_validation_packages(["texlive-science-doc", "texlive-metapost-doc"])


def test_fingerprints_survive_other_line_breaks():
    one = set(heldout.fingerprints("the words of this sentence are broken\nin one way here"))
    other = set(heldout.fingerprints("The words of this sen-\ntence are broken in\none way here"))
    assert one & other
    assert not one & set(heldout.fingerprints("quite another sentence that is about something else"))
    assert list(heldout.fingerprints("Introduction")) == []
