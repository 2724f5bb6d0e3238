"""The Space: what its views compute, and the app itself, served on loopback and asked through gradio_client."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image, ImageDraw, ImageFont

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from modeling_unit.reading_unit import Block  # noqa: E402
from spaces_demo import inference, limits  # noqa: E402
from spaces_demo.inference import Demo, Refused, likeness, open_page, parse_labels  # noqa: E402
from spaces_demo.sample_run import confidence_colour, draw_blocks  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DOG = ROOT / "spaces_demo" / "samples" / "pictures" / "dog.jpg"
ENDPOINTS = {"/read", "/name", "/scales", "/look_inside", "/about"}


@pytest.fixture(scope="module")
def demo():
    return Demo.load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of two paragraphs, and what strangers send."""
    folder = tmp_path_factory.mktemp("files")
    page = Image.new("L", (640, 260), 255)
    for y, text in ((30, "This section describes the files."), (140, "The other files are not used here.")):
        ImageDraw.Draw(page).text((30, y), text, font=ImageFont.load_default(26), fill=0)
    page.save(folder / "page.png")
    page.convert("RGB").save(folder / "two.pdf", save_all=True, append_images=[Image.new("RGB", (300, 300), "white")])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    (folder / "cut.jpg").write_bytes(DOG.read_bytes()[:2000])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "locked.pdf").write_bytes(_locked_pdf())
    return folder


def _locked_pdf() -> bytes:
    """A PDF whose encryption dictionary admits no password: its keys are not those of any."""
    parts = [
        b"1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n",
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n",
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>>endobj\n",
        b"4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<" + b"11" * 32 + b">/U<" + b"22" * 32 + b">>>endobj\n",
    ]
    out, places = b"%PDF-1.4\n", []
    for part in parts:
        places.append(len(out))
        out += part
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        out
        + b"xref\n0 5\n0000000000 65535 f \n"
        + table
        + b"trailer<</Size 5/Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>\n"
        b"startxref\n%d\n%%%%EOF\n" % len(out)
    )


# ------------------------------------------------------------------------------------------------------------- opening


def test_pages_of_a_pdf_are_opened_by_number(files):
    first, count = open_page(files / "two.pdf", 1)
    second, _ = open_page(files / "two.pdf", 2)
    assert count == 2
    assert first.width / first.height == pytest.approx(640 / 260, rel=0.01)
    assert second.width == second.height


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("text.png", 1, "not an image"),
        ("empty.png", 1, "empty"),
        ("cut.jpg", 1, "truncated"),
        ("bomb.png", 1, "megapixels"),
        ("broken.pdf", 1, "damaged"),
        ("locked.pdf", 1, "encrypted"),
        ("two.pdf", 3, "2 pages; there is no page 3"),
        ("two.pdf", 0, "at least 1"),
        ("two.pdf", float("nan"), "at least 1"),
        ("two.pdf", 1e400, "at least 1"),
        ("page.png", 2, "no page 2"),
        ("gone.png", 1, "gone"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line_without_its_folder(files, name, number, words):
    with pytest.raises(Refused, match=words) as caught:
        open_page(files / name, number)
    assert "\n" not in str(caught.value)
    assert str(files) not in str(caught.value)


def test_no_file_is_refused():
    with pytest.raises(Refused, match="Choose a file"):
        open_page(None)


def test_a_file_over_the_limit_is_refused_before_it_is_opened(files, monkeypatch):
    monkeypatch.setattr(inference, "MAX_FILE_BYTES", 100)
    with pytest.raises(Refused, match="limit"):
        open_page(files / "page.png")


def test_a_pdf_of_too_many_pages_is_refused(files, monkeypatch):
    monkeypatch.setattr(inference, "MAX_PDF_PAGES", 1)
    with pytest.raises(Refused, match="2 pages; the limit"):
        open_page(files / "two.pdf")


def test_labels_are_separated_by_commas_and_lines():
    assert parse_labels("a dog, a cat\n a  key ,,a dog\n") == ["a dog", "a cat", "a key"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "at least one"),
        (" ,\n, ", "at least one"),
        ("a," * 500_000, "1000000 characters"),
        (",".join(str(i) for i in range(limits.MAX_LABELS + 1)), f"{limits.MAX_LABELS + 1} labels"),
        ("x" * (limits.MAX_LABEL_LENGTH + 1), "A label has"),
    ],
)
def test_labels_that_are_too_much_are_refused(text, words):
    with pytest.raises(Refused, match=words):
        parse_labels(text)


# --------------------------------------------------------------------------------------------------------------- views


def test_a_page_comes_as_it_is_read(demo, files):
    parts = [partial for _, partial, _ in demo.read(files / "page.png")]
    assert (parts[0].page.text, len(parts[0].waiting)) == ("", 2)
    assert parts[-1].waiting == []
    assert "section describes" in parts[-1].page.text
    assert parts[-1].page.text == demo.reader.read(files / "page.png").text


def test_a_picture_has_a_caption_and_its_labels_ranked(demo):
    named = demo.name_picture(DOG, "a dog, a cat, a key")
    assert named.caption
    assert {one.label for one in named.ranking} == {"a dog", "a cat", "a key"}
    scores = [one.likelihood for one in named.ranking]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    assert json.loads(json.dumps(named.to_dict()))["caption"] == named.caption


def test_scales_of_a_picture_grow_and_the_usual_one_is_like_itself(demo):
    scales = demo.scales(DOG, "picture")
    areas = [one.size[0] * one.size[1] for one in scales]
    assert areas == sorted(areas)
    assert [one.size for one in scales] == [one.picture.size for one in scales]
    (usual,) = [one for one in scales if one.factor == 1]
    assert usual.likeness == usual.teacher_likeness == pytest.approx(1)
    assert areas[scales.index(usual)] == pytest.approx(128 * 128, rel=0.1)  # unit-tiny's x1
    for one in scales:
        assert one.grid == (one.size[1] // 16, one.size[0] // 16)  # its patches
        assert -1 <= one.likeness <= 1


def test_scales_of_a_text_are_of_one_line_of_it(demo, files):
    scales = demo.scales(files / "page.png", "text")
    (usual,) = [one for one in scales if one.factor == 1]
    assert usual.text in demo.reader.read(files / "page.png").text
    assert usual.picture.height <= 64


def test_scales_of_a_text_need_text(demo, tmp_path):
    Image.new("RGB", (200, 200), "white").save(tmp_path / "blank.png")
    with pytest.raises(Refused, match="No text"):
        demo.scales(tmp_path / "blank.png", "text")
    with pytest.raises(Refused, match="kind"):
        demo.scales(DOG, "sound")


def test_inside_are_the_model_and_its_teacher(demo):
    found = demo.look_inside(DOG)
    with Image.open(DOG) as dog:
        aspect = dog.width / dog.height
    for picture in (found.own, found.decoded, found.teacher):
        assert max(picture.size) == inference.SHOWN
        assert picture.width / picture.height == pytest.approx(aspect, rel=0.01)
    assert found.layer == demo.layers
    assert 0.5 < found.likeness <= 1  # it was trained to be like it
    assert demo.look_inside(DOG, layer=1).own.tobytes() != found.own.tobytes()


def test_without_strength_the_picture_itself_is_there(demo):
    found = demo.look_inside(DOG, strength=0)
    with Image.open(DOG) as dog:
        shown = dog.convert("RGB").resize(found.own.size, Image.Resampling.LANCZOS)
    assert found.own.tobytes() == shown.tobytes()


def test_a_model_without_teacher_shows_its_own_features(demo):
    alone = Demo(demo.reader, "alone", teacher=None)
    found = alone.look_inside(DOG)
    assert (found.decoded, found.teacher, found.likeness) == (None, None, None)
    assert {one.teacher_likeness for one in alone.scales(DOG)} == {None}


@pytest.mark.parametrize(("layer", "strength"), [(7, 0.5), (-1, 0.5), (1.5, 0.5), (1, 1.5), (1, float("nan"))])
def test_a_layer_or_strength_that_there_is_not_is_refused(demo, layer, strength):
    with pytest.raises(Refused):
        demo.look_inside(DOG, layer, strength)


def test_likeness_averages_the_finer_grid():
    coarse = torch.tensor([[[1.0, 0.0]]])
    fine = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    assert likeness(fine, coarse) == pytest.approx(1)
    assert likeness(fine, fine.flip(1)) == pytest.approx(0, abs=1e-6)


def test_the_model_of_the_environment_is_the_one_that_is_loaded(monkeypatch, tmp_path):
    folder = tmp_path / "my-model"
    tiny.unit_model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    monkeypatch.setenv("UNIT_MODEL_ID", str(folder))
    loaded = Demo.load()
    assert (loaded.name, loaded.teacher, loaded.vision_decoder, loaded.note) == ("my-model", None, True, "")


def test_weights_in_a_pickle_are_not_opened(tmp_path):
    from modeling_unit import Reader

    model = tiny.unit_model()
    model.save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (Demo.load, Reader.from_pretrained):
        with pytest.raises(OSError, match="safetensors"):
            load(str(tmp_path))


def test_blocks_that_wait_are_framed_in_grey_and_read_ones_in_their_colour():
    block = Block((10, 10, 90, 30), "text", 1.0)
    drawn = draw_blocks(Image.new("L", (100, 100), 255), [block], 100, waiting=[(10, 60, 90, 80)])
    assert drawn.getpixel((7, 20)) == confidence_colour(1.0)
    assert drawn.getpixel((7, 70)) == (0x6B, 0x70, 0x78)
    assert drawn.getpixel((50, 70)) == (255, 255, 255)


# ----------------------------------------------------------------------------------------------------------------- app


@pytest.fixture(scope="module")
def served(demo, tmp_path_factory):
    """The app on loopback, its temporary files in a folder of their own."""
    from spaces_demo import app

    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        built = app.build(lambda: demo)
        app.launch(built, "127.0.0.1", quiet=True)
        yield built, folder
        built.close(verbose=False)


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    return gradio_client.Client(
        served[0].local_url, verbose=False, analytics_enabled=False, download_files=str(tmp_path_factory.mktemp("got"))
    )


def sent(path):
    return gradio_client.handle_file(str(path))


def still_reads(client, files) -> bool:
    return "section" in client.predict(sent(files / "page.png"), 1, api_name="/read")[1]


def test_the_endpoints_are_named_and_documented(client, served):
    described = client.view_api(return_format="dict")
    assert set(described["named_endpoints"]) == ENDPOINTS
    assert described["unnamed_endpoints"] == {}
    with urllib.request.urlopen(f"{served[0].local_url}gradio_api/info") as answer:
        info = json.load(answer)["named_endpoints"]
    assert all(len(info[name]["description"]) > 30 for name in ENDPOINTS)
    for name in ENDPOINTS:
        for parameter in info[name]["parameters"]:
            assert 10 < len(parameter["python_type"]["description"]) < 120, parameter["parameter_name"]
        assert not [one["label"] for one in info[name]["returns"] if one["label"].startswith("value_")]


def test_reading_gives_page_text_blocks_and_a_file_as_they_come(client, files):
    job = client.submit(sent(files / "page.png"), 1, api_name="/read")
    picture, text, note, blocks, file = job.result(timeout=60)
    texts = [part[1] for part in job.outputs()]
    assert len(texts) >= 3
    assert texts[0] == ""
    assert all(text.startswith(part or "") for part in texts)
    assert "section" in text
    assert "words" in note
    assert blocks["text"] == text
    assert {"box", "text", "confidence"} <= set(blocks["blocks"][0])
    assert Path(file).read_text(encoding="utf-8") == text
    assert Path(file).name == "page.txt"
    assert Image.open(picture).size == (640, 260)


def test_a_page_of_a_pdf_can_be_read_by_its_number(client, files):
    assert "section" in client.predict(sent(files / "two.pdf"), 1, api_name="/read")[1]
    _, text, note, blocks, file = client.predict(sent(files / "two.pdf"), 2, api_name="/read")
    assert (text, blocks["blocks"], file) == ("", [], None)
    assert "Page 2 of 2" in note
    assert "Nothing was found" in note


def test_the_other_views_answer(client):
    said, found = client.predict(sent(DOG), "a dog, <b>a cat</b>", api_name="/name")
    assert set(found["labels"]) == {"a dog", "<b>a cat</b>"}
    assert "<b>" not in said
    said, found = client.predict(sent(DOG), "picture", api_name="/scales")
    assert said.count("<section") == len(found) == 4
    said, found = client.predict(sent(DOG), 0, 0.5, api_name="/look_inside")
    assert said.count("<section") == 3
    assert found["layer"] == 6
    assert "unit-tiny" in client.predict(api_name="/about")[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.png", "not an image"),
        ("bomb.png", "megapixels"),
        ("locked.pdf", "encrypted"),
        ("cut.jpg", "truncated"),
        ("broken.pdf", "damaged"),
    ],
)
def test_bad_files_are_refused_in_every_view_and_the_app_lives(client, files, name, words):
    for endpoint, more in (("/read", [1]), ("/name", ["a dog"]), ("/scales", ["picture"]), ("/look_inside", [0, 0.5])):
        with pytest.raises(Exception, match=words):
            client.predict(sent(files / name), *more, api_name=endpoint)
    assert still_reads(client, files)


def test_a_prompt_of_a_megabyte_is_refused_and_the_app_lives(client, files):
    with pytest.raises(Exception, match="1000000 characters"):
        client.predict(sent(DOG), "a" * 1_000_000, api_name="/name")
    assert still_reads(client, files)


def test_something_unforeseen_is_owned_up_to_without_its_words(client, demo, monkeypatch, files):
    monkeypatch.setattr(demo, "name_picture", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="Something went wrong") as caught:
        client.predict(sent(DOG), "a dog", api_name="/name")
    assert "division" not in str(caught.value)
    assert still_reads(client, files)


def test_a_file_over_the_limit_is_refused_while_it_is_sent(served, files, tmp_path, client):
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(limits.MAX_FILE_BYTES + 1_000_000)
    with pytest.raises(Exception, match=r"413|too large|exceed|limit|Maximum"):
        client.predict(sent(large), 1, api_name="/read")
    assert [path for path in served[1].rglob("*") if path.is_file() and path.stat().st_size > 20_000_000] == []
    assert still_reads(client, files)


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/setup.py", "{root}/spaces_demo/inference.py", "../setup.py"])
def test_nothing_outside_the_app_is_fetched_through_it(served, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served[0].local_url}gradio_api/file={path.format(root=ROOT)}")
    assert caught.value.code in (403, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=%252Fetc%252Fpasswd",
        "/gradio_api/file=..%2F..%2F..%2F..%2Fetc%2Fpasswd",
        "/gradio_api/file={samples}/../../../etc/passwd",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=/proc/self/environ",
        "/gradio_api/file=%00",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/static/../../../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
    ],
)
def test_no_spelling_of_a_path_leads_out_of_the_app(served, path):
    """Sent as it is: clients of libraries tidy such paths up before."""
    address = urllib.parse.urlsplit(served[0].local_url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.request("GET", path.format(samples=served[0].samples.name))
    answer = connection.getresponse()
    assert answer.status in (400, 403, 404)
    assert b"root:" not in answer.read()
    connection.close()


def test_a_path_of_the_server_is_no_upload(served, files):
    """A request that names a file that is there, but was never sent."""
    data = json.dumps({"data": [{"path": str(DOG), "meta": {"_type": "gradio.FileData"}}, "a dog"]}).encode()
    request = urllib.request.Request(
        f"{served[0].local_url}gradio_api/call/name", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{served[0].local_url}gradio_api/call/name/{event}") as answer:
            said = answer.read().decode()
    except urllib.error.HTTPError as error:
        said = f"event: error {error.code}"
    assert "event: error" in said
    assert "caption" not in said


def test_the_page_asks_no_other_host_for_anything(served):
    with urllib.request.urlopen(served[0].local_url) as answer:
        page = answer.read().decode()
    with urllib.request.urlopen(f"{served[0].local_url}theme.css") as answer:
        style = answer.read().decode()
    assert "googleapis" not in style + page
    assert "@import" not in style
    loaded = [part.split('"')[1] for part in page.split("<script")[1:] if part.startswith(' src="')]
    assert not [source for source in loaded if source.startswith("http")]
    assert '"analytics_enabled":false' in page.replace(" ", "")


def test_what_was_sent_and_made_is_deleted(demo, files, tmp_path, monkeypatch):
    from gradio.route_utils import delete_files_created_by_app

    from spaces_demo import app

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    built = app.build(lambda: demo)
    assert built.delete_cache == (limits.FILES_CHECKED, limits.FILES_LIVE)
    app.launch(built, "127.0.0.1", quiet=True)

    def kept():
        """Files of visitors; those of the page itself (examples) stay while it is served."""
        samples = {path.name for path in (*app.PAGES, *app.PICTURES)}
        return [p for p in (tmp_path / "gradio").rglob("*") if p.is_file() and p.name not in samples]

    try:
        client = gradio_client.Client(built.local_url, verbose=False, analytics_enabled=False, download_files=False)
        client.predict(sent(files / "page.png"), 1, api_name="/read")
        assert {path.name for path in kept()} >= {"page.png", "page.txt"}
        delete_files_created_by_app(built, age=limits.FILES_LIVE)
        assert {path.name for path in kept()} >= {"page.png", "page.txt"}
        delete_files_created_by_app(built, age=0)
        assert kept() == []
    finally:
        built.close(verbose=False)


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_space_installs_the_tested_versions():
    def pins(path):
        lines = [line.split(";")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return {line.lower() for line in lines if "==" in line and not line.startswith("#")}

    wanted = pins(ROOT / "spaces_demo" / "requirements.txt")
    assert wanted <= pins(ROOT / "constraints.txt")
    names = {line.split("==")[0] for line in wanted}
    assert {"torch", "transformers", "gradio", "pillow", "pypdfium2", "safetensors"} <= names


def test_the_front_matter_is_what_a_space_needs():
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(ROOT / "spaces_demo" / "README.md").data
    assert data.sdk == "gradio"
    assert (ROOT / data.app_file).is_file()
    assert len(data.short_description) <= 60  # the Hub refuses longer ones
    pinned = (ROOT / "spaces_demo" / "requirements.txt").read_text(encoding="utf-8")
    assert f"gradio=={data.sdk_version}" in pinned
    assert data.license == "apache-2.0"


def test_the_command_refuses_a_model_that_is_not_there(capsys):
    from unit_cli.__main__ import main

    assert main(["demo", "--model", "/no/such/model"]) == 2
    assert "/no/such/model: cannot be loaded" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "--port", "99999"])
