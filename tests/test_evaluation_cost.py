"""Cost: counts against closed forms, ratios of an encoder to itself, readers whose times are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common import encoder_flops
from modeling_unit import (
    UnitConfig,
    UnitForPreTraining,
    UnitImageProcessor,
    UnitProcessor,
    UnitVisionConfig,
    UnitVisionModel,
)
from training.evaluation import cost
from training.evaluation.contract import READ, NotMeasured, Options, TextSample, Work
from training.evaluation.peers.checkpoint import CheckpointReader
from training.evaluation.peers.worker import Reading, WorkerSubject
from training.evaluation.subjects import ModelSubject
from training.tokenizer import byte_tokenizer

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"patch_size": 8, "image_size": 64, "cpe_max_size": 64}
TEXT = {"model_type": "qwen3", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}


def image_processor() -> UnitImageProcessor:
    return UnitImageProcessor(patch_size=8, base_size=16, scale_as="area", max_side=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    UnitVisionModel(UnitVisionConfig(**VISION)).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wider")
    UnitVisionModel(UnitVisionConfig(**(VISION | {"intermediate_size": 48}))).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    tokenizer = byte_tokenizer()
    config = UnitConfig(
        vision_config=UnitVisionConfig(**VISION),
        connector_config={"connector_type": "mlp", "unshuffle": 1},
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(1)
    UnitForPreTraining(config).save_pretrained(folder)
    UnitProcessor(image_processor(), tokenizer, unshuffle=1).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 3)
    monkeypatch.setattr(cost, "SECONDS", 0.0)


def work(**subjects) -> Work:
    return Work(progress=False, subjects=subjects)


def by_name(figures) -> dict:
    """Name and what tells figures of one name apart -> figure."""
    found = {}
    for figure in figures:
        where = figure.of + figure.at.get("scale", "")
        where = where or figure.at.get("part") or figure.at.get("x_height") or ""
        assert (figure.name, where) not in found
        found[figure.name, where] = figure
    return found


# -- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [2, 4])
def test_counted_operations_agree_with_the_closed_form_in_fused_attention_too(start, patches):
    model = UnitVisionModel.from_pretrained(start, attn_implementation="sdpa").eval()
    pixels = torch.zeros(1, 3, 8 * patches, 8 * patches)
    assert cost.count_flops(model, pixels) == encoder_flops(model.config, patches, patches)


def test_an_encoder_is_counted_alone_and_in_its_model(full, monkeypatch):
    monkeypatch.setattr(cost, "_in_a_process", lambda subject, work: {"x1": 3_000_000, "x4": 5_000_000})
    subject = ModelSubject(full)
    found = by_name(cost.EncoderCost().figures(subject, work(model=subject)))
    model = UnitForPreTraining.from_pretrained(full)
    # a layer: two norms 4 D, qkv and proj 4 D (D + 1), mlp 2 D F + F + D; embedding 3 P P D; class token, positions of
    # an 8 x 8 table, last norm 2 D
    width, hidden = 16, 24
    layer = 4 * width + 4 * width * (width + 1) + 2 * width * hidden + hidden + width
    encoder = 2 * layer + 3 * 64 * width + width + 64 * width + 2 * width
    assert found["parameters", "encoder"].value == encoder
    assert found["parameters", "whole model"].value == sum(each.numel() for each in model.parameters()) > encoder
    assert found["disk_size", "encoder"].value == pytest.approx(4 * encoder / 1e6)
    on_disk = sum(file.stat().st_size for file in full.glob("*.safetensors"))
    assert found["disk_size", "whole model"].value == pytest.approx(on_disk / 1e6)
    for scale, side in (("x1", 16), ("x4", 32)):
        flops = encoder_flops(model.config.vision_config, side // 8, side // 8)
        assert found["forward_flops", scale].value == pytest.approx(flops / 1e9)
        assert found["forward_flops", scale].at["resolution"] == side
        latency = found["latency", scale]
        assert 0 < latency.low <= latency.value <= latency.high
        assert (latency.items, latency.unit, latency.better) == (3, "ms", "lower")
    assert found["peak_memory", "x4"].value == 5.0


def test_peak_memory_is_weights_and_what_a_pass_holds(start):
    weights = cost.weights_size(UnitVisionModel.from_pretrained(start))
    measured = cost.measure_memory(str(start), "cpu")
    assert set(measured) == {"x1", "x4"}
    assert all(weights <= each < weights + (64 << 20) for each in measured.values())


def test_memory_that_cannot_be_measured_is_a_note(start, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such process")

    monkeypatch.setattr("training.evaluation.measuring.in_a_process", fails)
    task = work()
    found = by_name(cost.EncoderCost().figures(ModelSubject(start, "teacher", "teacher"), task))
    assert ("peak_memory", "x1") not in found
    assert ("latency", "x1") in found
    assert task.notes == ["teacher: peak memory could not be measured here (no such process)."]


def test_x4_is_four_times_the_area_or_the_side_as_the_processor_says():
    class Encoder:
        patch_size, resolution = 14, 224

    encoder = Encoder()
    encoder.processor = UnitImageProcessor(patch_size=14, base_size=224, scale_as="area")
    assert cost.sides(encoder) == {"x1": 224, "x4": 448}
    encoder.processor = UnitImageProcessor(patch_size=14, base_size=224, scale_as="side")
    assert cost.sides(encoder) == {"x1": 224, "x4": 896}
    encoder.processor = object()
    assert cost.sides(encoder) == {"x1": 224, "x4": 448}


# -- against the start ------------------------------------------------------------------------------------------------


def test_an_encoder_that_kept_its_architecture_costs_what_its_start_costs(full, start):
    model, other = ModelSubject(full), ModelSubject(start, "start", "start")
    task = work(model=model, start=other)
    found = by_name(cost.AgainstStart().figures(model, task))
    assert found["architecture_equal", ""].value == 1.0
    assert found["parameters_ratio", ""].value == 1.0
    assert found["forward_flops_ratio", "x1"].value == found["forward_flops_ratio", "x4"].value == 1.0
    ratio = found["latency_ratio", "x4"]
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert task.notes == []
    # both times are those of the turns, and the encoder alone is not timed again
    assert (found["latency", "x1"].of, found["latency", "startx1"].of) == ("", "start")
    assert found["latency", "x1"].items == found["latency", "startx1"].items == found["latency_ratio", "x1"].items
    for subject in (model, other):
        alone = cost.EncoderCost().figures(subject, task)
        assert "latency" not in {figure.name for figure in alone}
    stage = ModelSubject(full, "stage 1", "stage")
    assert "latency" not in {figure.name for figure in cost.AgainstStart().figures(stage, task)}


def test_an_architecture_that_changed_is_found_and_named(full, wider):
    model, other = ModelSubject(full), ModelSubject(wider, "start", "start")
    task = work(model=model, start=other)
    found = by_name(cost.AgainstStart().figures(model, task))
    assert found["architecture_equal", ""].value == 0.0
    assert found["parameters_ratio", ""].value < 1.0
    (note,) = task.notes
    assert "mlp.fc1.bias is (24,) and (48,)" in note


def test_the_teacher_is_the_start_where_no_other_is_named_and_nobody_is_a_note(full, start):
    model, teacher = ModelSubject(full), ModelSubject(start, "teacher", "teacher")
    found = by_name(cost.AgainstStart().figures(model, work(model=model, teacher=teacher)))
    assert found["architecture_equal", ""].value == 1.0
    with pytest.raises(NotMeasured, match="--start MODEL"):
        list(cost.AgainstStart().figures(model, work(model=model)))


def test_timing_takes_turns(full, start, monkeypatch):
    """A machine that gets slower and slower must not favour whoever is timed first."""
    clock = {"now": 0.0, "calls": 0}
    order = []

    def forward(module, pixels):
        clock["calls"] += 1
        clock["now"] += 1.0 + clock["calls"]
        order.append(id(module))

    monkeypatch.setattr(cost, "forward", forward)
    monkeypatch.setattr(cost, "count_flops", lambda *_: 1)
    monkeypatch.setattr("training.evaluation.measuring.time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr(cost, "ROUNDS", 50)
    model, other = ModelSubject(full), ModelSubject(start, "start", "start")
    found = by_name(cost.AgainstStart().figures(model, work(model=model, start=other)))
    assert all(one != two for one, two in zip(order[0::2], order[1::2], strict=True))
    assert found["latency_ratio", "x4"].value == pytest.approx(1.0, abs=0.02)
    ours, its = found["latency", "x4"].value, found["latency", "startx4"].value
    assert ours / its == pytest.approx(1.0, abs=0.02)


def test_median_and_its_interval():
    assert cost.median_interval(np.full(9, 2.5), 0) == (2.5, 2.5, 2.5)
    middle, low, high = cost.median_interval(np.arange(101.0), 0)
    # the 95% interval of a median of 101 ranks is about rank 51 -+ 1.96 * sqrt(101) / 2
    assert middle == 50.0
    assert low == pytest.approx(50 - 9.85, abs=2)
    assert high == pytest.approx(50 + 9.85, abs=2)


# -- reading ----------------------------------------------------------------------------------------------------------


class Peer(WorkerSubject):
    """Takes as many seconds as the page is wide; a page of 99 pixels is too much for it."""

    startup = 4.0

    def start(self):
        self.startup = 4.0

    def hash(self):
        return "peer"

    def _reading(self, sample):
        if sample.image.width == 99:
            return Reading("", error="out of memory")
        return Reading(sample.text.replace("b", "x"), float(sample.image.width), 1_000_000 * sample.image.width)


def page(index, width, x_height):
    return TextSample(index, Image.new("RGB", (width, 4)), "a b", x_height, layout="page")


def read(samples, monkeypatch, task=None) -> dict:
    monkeypatch.setattr(cost, "pages_to_time", lambda options, work: samples)
    return by_name(cost.ReadingCost(Options()).figures(Peer("peer", "peer"), task or work()))


def test_time_and_memory_of_pages_by_their_size_with_those_that_failed_counted(monkeypatch):
    task = work()
    found = read([page(0, 2, 14.0), page(1, 4, 14.0), page(2, 5, 7.0), page(3, 99, 7.0)], monkeypatch, task)
    large, small = found["seconds_per_page", 14.0], found["seconds_per_page", 7.0]
    assert (large.value, large.items, large.failed, large.unit, large.better) == (3.0, 2, 0, "s", "lower")
    assert 2.0 <= large.low <= large.high <= 4.0
    assert (small.value, small.items, small.failed) == (5.0, 2, 1)
    throughput = found["pages_per_second", 14.0]
    assert (throughput.value, throughput.low, throughput.high) == (1 / 3, 1 / large.high, 1 / large.low)
    assert found["cold_start", ""].value == 4.0
    assert found["peak_memory", ""].value == 5.0  # MB
    assert found["word_f1", 14.0].value == 0.5  # one of two words, on either side
    assert found["word_f1", 7.0].value == pytest.approx(2 * 1 / (2 + 4))  # the failed page is read empty
    assert [item.get("error") for item in task.items] == [None, None, None, "out of memory"]


def test_a_reader_that_reads_no_page_is_one_line(monkeypatch):
    with pytest.raises(NotMeasured, match="peer read none of 1 pages: out of memory"):
        read([page(0, 99, 7.0)], monkeypatch)


@pytest.fixture
def no_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIT_CACHE", str(tmp_path / "cache"))


def test_pages_that_ship_stand_in_where_the_set_is_not_built(no_sets, tmp_path, monkeypatch):
    folder = tmp_path / "pages"
    folder.mkdir()
    Image.new("RGB", (20, 10), "white").save(folder / "one.png")
    (folder / "one.txt").write_text("some text")
    monkeypatch.setattr(cost, "SHIPPED_PAGES", folder)
    task = work()
    (sample,) = cost.pages_to_time(Options(), task)
    assert (sample.text, sample.layout, sample.x_height, sample.source) == ("some text", "page", 0.0, "one")
    assert "ship with the demo" in task.notes[0]
    fingerprint = cost.ReadingCost(Options()).fingerprint()
    assert fingerprint["set"] == "shipped pages"
    json.dumps(fingerprint)


def test_no_page_at_all_is_one_line(no_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SHIPPED_PAGES", tmp_path / "nothing")
    with pytest.raises(NotMeasured, match="evaluation-sets"):
        cost.ReadingCost(Options()).fingerprint()
    with pytest.raises(NotMeasured, match="pages"):
        cost.pages_to_time(Options(), work())


def test_a_checkpoint_reads_in_its_worker_as_it_reads_here(full):
    """In this process, for a process of its own would load torch anew."""
    from modeling_unit import Reader
    from training.evaluation.peers.workers import unit_worker

    reader = CheckpointReader(str(full), "UNIT", "hash")
    settings = json.loads(reader.command()[-1])
    assert settings["threads"] == torch.get_num_threads()
    assert (reader.can, reader.hash()) == ({READ}, "hash")
    version, answer = unit_worker.start(settings)
    image = Image.new("RGB", (60, 20), "white")
    image.paste((0, 0, 0), (10, 5, 30, 14))
    text, peak = answer(image.tobytes(), {"width": 60, "height": 20})
    assert text == Reader.from_pretrained(str(full)).read_many([image])[0].text
    assert peak > 50 << 20
    assert version.startswith("torch ")


def test_the_suite_is_called_cost():
    assert {each.suite for each in cost.evaluators(Options())} == {"cost"}


def test_checkpoints_saved_in_two_precisions_are_timed_in_one():
    for saved in (torch.float32, torch.bfloat16):
        module = torch.nn.Linear(2, 2).to(saved)
        timed = cost.in_one_precision(module, "cpu")
        assert timed.weight.dtype == torch.float32
        assert module.weight.dtype == saved  # the subject's own is left as it was
