import json
import os
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from training.evaluation import peers
from training.evaluation.contract import READ, NotMeasured, Options, TextSample
from training.evaluation.peers import environment, hub, tesseract
from training.evaluation.peers.worker import WORKERS, Worker, WorkerSubject
from training.evaluation.sets import default_sets

ENGINE = f"""
import os, sys, time
sys.path.insert(0, {str(WORKERS)!r})
from serve import serve

def start():
    if sys.argv[1:] == ["refuse"]:
        raise OSError("no weights")
    if sys.argv[1:] == ["die"]:
        print("out of memory", file=sys.stderr)
        sys.exit(3)
    print("a library's chatter")
    return "engine 1.0", read

def read(pixels, request):
    order = pixels[0]  # the first pixel's red says what to do
    if order == 1:
        raise ValueError("cannot read this")
    if order == 2:
        print("last words", file=sys.stderr)
        sys.stderr.flush()
        os._exit(7)
    if order == 3:
        time.sleep(60)
    if order == 4:
        return 5  # no text
    if order == 5:  # bytes that are no answer, on the channel itself
        for number in range(3, 9):
            try:
                if not os.get_inheritable(number) and os.path.realpath(f"/proc/self/fd/{{number}}").count("pipe"):
                    os.write(number, b"\\xff" * 8)
            except OSError:
                pass
        return ""
    return f"{{request['width']}}x{{request['height']}} {{request['layout']}} {{len(pixels)}} {{os.getpid()}}"

serve(start)
"""


class Engine(WorkerSubject):
    def __init__(self, folder, *arguments, timeout=20.0):
        super().__init__("engine", "engine", timeout=timeout)
        self.script, self.arguments = folder / "engine.py", arguments
        self.script.write_text(ENGINE)
        self.asked = 0

    def command(self):
        return [sys.executable, "-I", "-S", str(self.script), *self.arguments]

    def prepared(self, sample):
        self.asked += 1
        return sample.image


def sample(order=0, size=(5, 3), x_height=0.0, layout="block", index=0):
    image = Image.new("RGB", size, "white")
    image.putpixel((0, 0), (order, 0, 0))
    return TextSample(index, image, "", x_height, layout=layout)


@pytest.fixture
def engine(tmp_path):
    subject = Engine(tmp_path)
    yield subject
    subject.release()


def test_a_worker_is_handed_pixels_and_their_shape_and_what_it_prints_disturbs_nothing(engine):
    first, second = engine.read([sample(), sample(size=(7, 2), layout="page")])
    assert first.startswith("5x3 block 45 ")
    assert second.startswith("7x2 page 42 ")
    assert first.split()[-1] == second.split()[-1]  # one process for both
    assert engine.version == "engine 1.0"
    assert engine.startup > 0


def test_seconds_and_memory_are_of_the_process_that_reads(engine):
    (reading,) = engine.readings([sample()])
    assert 0 <= reading.seconds < 5
    assert 1 << 20 < reading.peak < 1 << 28  # an interpreter without libraries; this process holds torch


def test_an_error_of_the_engine_fails_one_item_and_leaves_the_process_alone(engine):
    before, failed, after = engine.readings([sample(), sample(1), sample()])
    assert failed.error == "ValueError: cannot read this"
    assert failed.text == ""
    assert before.text == after.text


def test_a_process_that_dies_fails_one_item_and_is_started_anew(engine):
    before, failed, after = engine.readings([sample(), sample(2), sample()])
    assert failed.error == "the reader's process died (exit status 7: last words)"
    assert after.text
    assert before.text.split()[-1] != after.text.split()[-1]


def test_a_process_that_hangs_is_killed_and_the_rest_goes_on(tmp_path):
    subject = Engine(tmp_path, timeout=0.5)
    failed, after = subject.readings([sample(3), sample()])
    subject.release()
    assert failed.error.startswith("the reader's process gave no answer within")
    assert after.text


def test_a_process_that_reads_nothing_does_not_hold_up_an_interruption(tmp_path):
    ready = json.dumps({"ready": True}).encode()
    said = struct.pack(">I", len(ready)) + ready
    script = f"import os, time; os.write(1, {said!r}); time.sleep(60)"
    worker = Worker([sys.executable, "-I", "-S", "-c", script], timeout=40.0)
    # a little more than a pipe holds: the end of it still waits to be written when the process is closed
    image = Image.new("RGB", (152, 152), "white")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker.read(image, sample())
    assert time.monotonic() - begin < 20.0
    assert worker._process.returncode == -signal.SIGKILL


def test_garbage_is_no_reading(engine):
    number, noise, after = engine.readings([sample(4), sample(5), sample()])
    assert number.error == noise.error == "the reader's process answered what is no reading"
    assert after.text


def test_a_batch_with_a_failure_raises_and_its_items_are_not_read_again_one_by_one(engine):
    batch = [sample(index=0), sample(1, index=1), sample(index=2)]
    with pytest.raises(RuntimeError, match="engine: ValueError: cannot read this"):
        engine.read(batch)
    assert engine.read([batch[0]])[0].startswith("5x3")
    with pytest.raises(RuntimeError, match="cannot read this"):
        engine.read([batch[1]])
    assert engine.asked == 3


def test_a_sample_without_an_image_fails_alone(engine):
    nothing = TextSample(0, None, "")
    assert engine.readings([nothing])[0].error == "there is no image"


@pytest.mark.parametrize(
    ("how", "said"),
    [("refuse", "OSError: no weights"), ("die", "exit status 3: out of memory"), ("", "cannot be started")],
)
def test_an_engine_that_cannot_start_is_one_line(tmp_path, how, said):
    subject = Engine(tmp_path, how)
    if not how:
        subject.command = lambda: [str(tmp_path / "nothing")]
    with pytest.raises(NotMeasured, match=said) as caught:
        subject.read([sample()])
    assert str(caught.value).startswith("engine cannot be run: ")
    assert "\n" not in str(caught.value)


# -- by name ----------------------------------------------------------------------------------------------------------


def test_an_unknown_peer_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="unknown peer 'abbyy'; known: tesseract, rapidocr, and hf:FOLDER_OR_ID"):
        peers.subjects(["tesseract", "abbyy"])
    with pytest.raises(ValueError, match="unknown peer 'hf:'"):
        peers.subjects(["hf:"])


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


def test_peers_that_are_not_installed_are_lines_with_the_command(nothing_installed):
    found, notes = peers.subjects(["tesseract", "rapidocr"])
    assert found == []
    assert [note.split(":")[0] for note in notes] == ["tesseract is not installed", "rapidocr is not installed"]
    assert "`unit peers install tesseract`" in notes[0]
    assert "`unit peers install rapidocr`" in notes[1]


def test_installing_where_there_is_no_apt_is_one_line(nothing_installed):
    with pytest.raises(RuntimeError, match="this system has no apt"):
        peers.install("tesseract", progress=False)
    with pytest.raises(ValueError, match="nothing to install"):
        peers.install("hf:someone/model")


def test_the_command_says_what_is_known_and_what_is_there(nothing_installed, capsys):
    from unit_cli.__main__ import main

    assert main(["peers", "list"]) == 0
    assert "rapidocr: rapidocr is not installed" in capsys.readouterr().out
    assert main(["peers", "install", "abbyy"]) == 2
    assert "unknown peer 'abbyy'" in capsys.readouterr().err
    assert main(["peers", "install"]) == 2
    assert "install what?" in capsys.readouterr().err


# -- rapidocr, in an environment that pip makes -----------------------------------------------------------------------

RAPIDOCR = """
class RapidOCR:
    def __init__(self, params):
        assert params["EngineConfig.onnxruntime.intra_op_num_threads"] >= 1
    def __call__(self, picture):
        found = type("Output", (), {})()
        blue, green, red = picture[0, 0].tolist()
        found.txts = None if red == 255 else (f"{picture.shape}", f"red {red} blue {blue}")
        return found
"""
# What the worker asks of the environment's own numpy and Pillow, without their weight
NUMPY = """
uint8 = None
class Array:
    def __init__(self, data): self.data = data
    def reshape(self, *shape): self.shape = shape; return self
    def __getitem__(self, key):
        if key == (0, 0):
            return self
        assert key[2] == slice(None, None, -1)
        self.data = self.data[2::-1]; return self
    def tolist(self): return list(self.data[:3])
def frombuffer(data, dtype): return Array(data)
def ascontiguousarray(array): return array
"""
PIL = {
    "__init__": "",
    "Image": "class Made:\n  width, height = 2, 2\n  tobytes = lambda self: b'\\xff' * 12\nnew = lambda *_: Made()",
    "ImageDraw": "class Draw:\n  def __init__(self, image): pass\n  def text(self, *args, **kwargs): pass",
    "ImageFont": "load_default = lambda size: None",
}


def write_wheel(folder: Path, name: str, version: str, files: dict) -> None:
    about = f"{name}-{version}.dist-info"
    files = dict(files)
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = f"{about}/RECORD"
    files[record] = "".join(f"{file},,\n" for file in (*files, record))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)


def test_rapidocr_is_installed_apart_and_reads_in_bgr(tmp_path, monkeypatch):
    """Through a real virtual environment and a real pip; the packages are stand-ins, as there is no network."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "rapidocr", "3.10.0", {"rapidocr/__init__.py": RAPIDOCR})
    write_wheel(wheels, "numpy", "2.4.6", {"numpy/__init__.py": NUMPY})
    write_wheel(wheels, "pillow", "13.0.0", {f"PIL/{name}.py": code for name, code in PIL.items()})
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))

    packages = ("rapidocr==3.10.0", "numpy==2.4.6", "pillow==13.0.0", "nothing==1; python_version < '3'")
    monkeypatch.setattr(environment, "RAPIDOCR_PACKAGES", packages)
    folder = peers.install("rapidocr", progress=False)
    assert [each.name for each in folder.parent.iterdir()] == ["rapidocr-3.10.0"]
    assert peers.install("rapidocr", progress=False) == folder

    (subject,), notes = peers.subjects(["rapidocr"])
    assert notes == []
    assert subject.can == {READ}
    assert subject.role == "peer"
    blank, read = subject.read([sample(255), sample(9, size=(4, 6))])
    subject.release()
    assert blank == ""
    assert read == "(6, 4, 3)\nred 9 blue 0"
    assert subject.version == "rapidocr 3.10.0"

    before = subject.hash()
    subject.packages = [*subject.packages[:-1], "rapidocr==3.10.1"]
    assert subject.hash() != before


def test_an_installation_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    said = "print('Collecting rapidocr'); print('ERROR: No matching distribution found for rapidocr'); exit(1)"
    pip = environment._pip
    monkeypatch.setattr(environment, "_pip", lambda command, *rest: pip([sys.executable, "-c", said], *rest))
    run = lambda command, **_: type("Done", (), {"returncode": int("broken" in sys.executable)})  # noqa: E731
    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"^installing rapidocr-3\.10\.0 failed: No matching distribution found"):
        peers.install("rapidocr", progress=False)
    monkeypatch.setattr(sys, "executable", "broken")
    with pytest.raises(RuntimeError, match="this Python has no venv"):
        peers.install("rapidocr", progress=False)
    assert list((tmp_path / "cache" / "peers").iterdir()) == []


# -- tesseract --------------------------------------------------------------------------------------------------------


def fake_tesseract(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "tesseract"
    answers = 'case "$1" in --version) echo "tesseract 9.9"; exit;; --list-langs) echo "none"; exit;; esac\n'
    program.write_text("#!/bin/sh\n" + answers + script + "\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.fixture
def released():
    made = []
    yield made
    for subject in made:
        subject.release()


def test_tesseract_gets_small_type_enlarged_and_pages_are_segmented(tmp_path, monkeypatch, released):
    fake_tesseract(tmp_path, monkeypatch, f'cat > "{tmp_path}/seen.ppm"; echo "$@"; printf "some text\\n\\f"')
    (plain, enlarged), notes = peers.subjects(["tesseract"])
    released += [plain, enlarged]
    assert (plain.name, enlarged.name, notes) == ("tesseract", "tesseract, upscaled", [])

    def seen(subject, image):
        (text,) = subject.read([image])
        with Image.open(tmp_path / "seen.ppm") as picture:
            return picture.size, text

    small = sample(size=(30, 10), x_height=8.0)
    assert seen(plain, small) == ((30, 10), "stdin stdout -l eng --psm 6\nsome text")
    assert seen(enlarged, small)[0] == (45, 15)  # 12 / 8 = 1.5 times
    assert seen(enlarged, sample(size=(30, 10), x_height=25.0))[0] == (30, 10)
    assert seen(enlarged, sample(size=(30, 10)))[0] == (30, 10)  # of unknown x-height
    assert "--psm 3" in seen(plain, sample(layout="page"))[1]
    assert plain.version == "tesseract 9.9"
    assert plain.hash() != enlarged.hash() == tesseract.Tesseract(tesseract.UPSCALE_TO).hash()


def test_tesseract_that_fails_or_hangs_says_so_and_the_rest_goes_on(tmp_path, monkeypatch, released):
    script = 'n=$(head -c 3 | wc -c); cat > /dev/null; echo first >&2; echo "out of luck" >&2; exit 3'
    fake_tesseract(tmp_path, monkeypatch, script)
    subject = tesseract.Tesseract()
    released.append(subject)
    assert subject.readings([sample()])[0].error.endswith("tesseract failed with status 3: out of luck")
    fake_tesseract(tmp_path, monkeypatch, "exec sleep 60")
    subject = tesseract.Tesseract(timeout=0.6)
    released.append(subject)
    failed = subject.readings([sample()])[0]
    assert "gave no answer within" in failed.error


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="a peer for comparison, not a dependency")
def test_tesseract_reads_large_print(released):
    image = Image.new("RGB", (600, 60), "white")
    ImageDraw.Draw(image).text((10, 8), "Held out pages", fill="black", font=ImageFont.load_default(36))
    subject = tesseract.Tesseract()
    released.append(subject)
    (reading,) = subject.readings([TextSample(0, image, "Held out pages", 20.0)])
    assert reading.text == "Held out pages"
    assert reading.peak > 10 << 20  # its model alone is larger


def test_an_unpacked_tesseract_runs_with_its_own_libraries_and_models(tmp_path, monkeypatch, released):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))
    tree = tmp_path / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "usr/lib/x").mkdir(parents=True)
    (tree / "usr/lib/x/libtesseract.so.5").touch()
    (tree / "usr/share/tesseract-ocr/5/tessdata").mkdir(parents=True)
    (tree / "usr/share/tesseract-ocr/5/tessdata/eng.traineddata").write_bytes(b"model")
    program = tree / "usr/bin/tesseract"
    program.write_text('#!/bin/sh\nif [ "$1" = --list-langs ]; then echo eng; fi\necho "$TESSDATA_PREFIX"\n')
    program.chmod(0o755)
    monkeypatch.setattr(environment, "_lacking_packages", lambda: ["tesseract-ocr"])
    monkeypatch.setattr(environment, "fetch_deb", lambda name: tree)
    peers.install("tesseract", progress=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    subject = tesseract.Tesseract()
    released.append(subject)
    assert subject.variables["LD_LIBRARY_PATH"] == str(tree / "usr/lib/x")
    assert subject.read([sample()]) == [str(tree / "usr/share/tesseract-ocr/5/tessdata")]


def test_packages_of_tesseract_are_its_own_and_those_that_the_machine_lacks(monkeypatch):
    depends = "tesseract-ocr\n  Depends: libc6\n |Depends: <virtual>\n    x\nlibc6\nlibtiff6\ntesseract-ocr-eng\n"
    said = {"apt-cache": depends + "libtesseract5\nxfonts\n<virtual>\n"}
    said["apt-get"] = "Reading lists...\nInst libtiff6 (4.5 Debian [amd64])\nConf libtiff6 (4.5 Debian)\n"
    status = {"apt-cache": 0, "apt-get": 0}

    def run(command, **_):
        name = command[0]
        assert name == "apt-cache" or "--simulate" in command  # nothing is installed
        return type("Done", (), {"returncode": status[name], "stdout": said[name], "stderr": "E: held packages"})

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment._lacking_packages() == ["libtesseract5", "libtiff6", "tesseract-ocr", "tesseract-ocr-eng"]
    status["apt-get"] = 100
    with pytest.raises(RuntimeError, match="apt cannot tell what tesseract needs: E: held packages"):
        environment._lacking_packages()
    said["apt-cache"] = ""
    with pytest.raises(RuntimeError, match="apt-get update"):
        environment._lacking_packages()


def test_sets_of_text_say_whether_a_reader_has_to_find_the_parts_of_a_page():
    layouts = {each.name: each.layout for each in default_sets(Options(sets=("funsd", "mine=/somewhere")))}
    assert layouts["blocks"] == "block"
    assert {layout for name, layout in layouts.items() if name != "blocks"} == {"page"}


# -- models of the Hub ------------------------------------------------------------------------------------------------

WORDS = ["north", "south", "east", "west", "stone", "river", "cloud", "green", "seven", "light"]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<s_synthdog>", "<imgpad>", "<|im_start|>", "<|im_end|>"]


def word_tokenizer():
    """One word a piece, so that whatever a random model writes is words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(SPECIALS + WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[4:],
    )


def encoder_decoder(folder: Path, family: str) -> Path:
    """A tiny random TrOCR, Donut or Nougat, as their repositories are laid out."""
    import transformers
    from transformers import (
        DonutImageProcessorPil,
        DonutProcessor,
        DonutSwinConfig,
        MBartConfig,
        NougatImageProcessorPil,
        NougatProcessor,
        NougatTokenizer,
        TrOCRConfig,
        TrOCRProcessor,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    tokenizer = word_tokenizer()
    shared = {"vocab_size": len(tokenizer), "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    shared |= {"decoder_ffn_dim": 16, "max_position_embeddings": 12, "pad_token_id": 1, "eos_token_id": 2}
    shared |= {
        "forced_eos_token_id": None,
        "bos_token_id": 0,
        "is_decoder": True,
        "add_cross_attention": True,
        "init_std": 2.0,
    }
    size = {"height": 32, "width": 32}
    if family == "trocr":
        encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        encoder.image_size, encoder.patch_size = 32, 16
        decoder = TrOCRConfig(**shared)
        processor = TrOCRProcessor(ViTImageProcessorPil(size=size), tokenizer)
    else:
        encoder = DonutSwinConfig(image_size=[32, 32], patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
        encoder.window_size = 4
        decoder = MBartConfig(**shared, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2)
        if family == "nougat":
            vocabulary = {piece: index for index, piece in enumerate([*SPECIALS, *("Ġ" + word for word in WORDS)])}
            processor = NougatProcessor(NougatImageProcessorPil(size=size), NougatTokenizer(vocab=vocabulary))
        else:
            processor = DonutProcessor(DonutImageProcessorPil(size=size), tokenizer)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    transformers.set_seed(3)
    model = VisionEncoderDecoderModel(config)
    settings = model.generation_config
    settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = 0, 1, 2
    settings.suppress_tokens = list(range(len(SPECIALS)))  # words alone, up to the last position
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def got_ocr2(folder: Path) -> Path:
    """A tiny random GOT-OCR2."""
    import transformers
    from transformers import (
        GotOcr2Config,
        GotOcr2ForConditionalGeneration,
        GotOcr2ImageProcessorPil,
        GotOcr2Processor,
    )

    tokenizer = word_tokenizer()
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 256, "patch_size": 4, "mlp_dim": 16, "window_size": 4, "global_attn_indexes": []}
    config = GotOcr2Config(vision_config=vision, text_config=text, image_token_index=SPECIALS.index("<imgpad>"))
    transformers.set_seed(3)
    model = GotOcr2ForConditionalGeneration(config)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = 2, 1, 0
    settings.suppress_tokens = list(range(len(SPECIALS)))
    model.save_pretrained(folder)
    GotOcr2Processor(GotOcr2ImageProcessorPil(size={"height": 256, "width": 256}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    root = tmp_path_factory.mktemp("readers")
    found = {family: encoder_decoder(root / family, family) for family in ("trocr", "donut", "nougat")}
    return found | {"got_ocr2": got_ocr2(root / "got_ocr2")}


def page_of(lines: list[str]) -> Image.Image:
    image = Image.new("RGB", (500, 40 + 50 * len(lines)), "white")
    for index, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 20 + 50 * index), line, fill="black", font=ImageFont.load_default(24))
    return image


def read_here(subject, image, monkeypatch) -> str:
    """What the worker's own function reads, in this process."""
    import json

    from training.evaluation.peers.workers import hub_worker

    monkeypatch.setattr(hub_worker, "MOST_PIECES", 6)
    settings = json.loads(subject.command()[-1])
    _, read = hub_worker.start(settings)
    return read(image.tobytes(), {"width": image.width, "height": image.height})[0]


@pytest.mark.parametrize("family", ["trocr", "donut", "nougat", "got_ocr2"])
def test_each_family_of_hub_models_reads_words(readers, family, monkeypatch):
    (subject,), notes = peers.subjects([f"hf:{readers[family]}"])
    assert (subject.name, subject.family, notes) == (family, family, [])
    text = read_here(subject, page_of(["a line of text", "another line", "the third"]), monkeypatch)
    assert text
    assert set(text.split()) <= set(WORDS)
    if family == "trocr":  # a line of the page is a line of the answer
        assert len(text.splitlines()) == 3
        assert "own layout" in subject.notes[0]


def test_donut_is_asked_with_a_prompt_that_its_tokenizer_has(readers, monkeypatch):
    import torch
    from transformers import AutoProcessor, VisionEncoderDecoderModel

    image = page_of(["a line of text"])
    subject = hub.HubReader(str(readers["donut"]))
    model, processor = (kind.from_pretrained(readers["donut"]) for kind in (VisionEncoderDecoderModel, AutoProcessor))
    pixels = processor(images=image, return_tensors="pt").pixel_values
    asked = torch.tensor([[SPECIALS.index("<s_synthdog>")]])
    made = model.eval().generate(pixels, decoder_input_ids=asked, max_new_tokens=5, do_sample=False)
    expected = " ".join((SPECIALS + WORDS)[index] for index in made[0, 1:].tolist())
    assert read_here(subject, image, monkeypatch) == expected


def test_a_hub_model_reads_in_a_process_of_its_own(readers):
    subject = hub.HubReader(str(readers["trocr"]))
    try:
        (reading,) = subject.readings([TextSample(0, page_of(["a line", "and one more"]), "")])
    finally:
        subject.release()
    assert reading.error == ""
    assert len(reading.text.splitlines()) == 2
    assert set(reading.text.split()) <= set(WORDS)
    assert reading.peak > 50 << 20
    assert reading.seconds > 0
    assert subject.version.startswith("transformers ")


def test_hash_of_a_folder_follows_its_weights(readers, tmp_path):
    copy = tmp_path / "trocr"
    shutil.copytree(readers["trocr"], copy)
    assert hub.HubReader(str(copy)).hash() == hub.HubReader(str(readers["trocr"])).hash()
    weights = copy / "model.safetensors"
    data = np.fromfile(weights, dtype=np.uint8)
    data[-1] ^= 1
    data.tofile(weights)
    assert hub.HubReader(str(copy)).hash() != hub.HubReader(str(readers["trocr"])).hash()


def test_models_that_cannot_be_had_are_one_line(readers, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    found, notes = peers.subjects(["hf:some/model", "hf:no/such/id", f"hf:{tmp_path}/empty", f"hf:{tmp_path}/clip"])
    assert found == []
    assert "the Hub cannot be reached" in notes[0]
    assert "nothing to be had from the Hub" in notes[1]
    assert "no config.json there" in notes[2]
    assert "is a 'clip' model, which is none of TrOCR, Donut, Nougat and GOT-OCR2" in notes[3]
    assert not any("\n" in note for note in notes)


def test_weights_that_are_a_pickle_are_refused(readers, tmp_path, monkeypatch):
    copy = tmp_path / "pickled"
    shutil.copytree(readers["trocr"], copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(OSError, match="safetensors"):
        read_here(hub.HubReader(str(copy)), sample().image, monkeypatch)
