"""The Space's interface; the work is in inference.py. Start it with `unit demo`, or `python spaces_demo/app.py`.

The page is served as soon as gradio is there; the model loads beside it, and whoever asks earlier waits for it.
Endpoints, for `gradio_client`: `/read`, `/name`, `/scales`, `/look_inside`, `/about`.
"""

from __future__ import annotations

import base64
import functools
import html
import inspect
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, as a Space does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from spaces_demo.limits import (
    FILES_CHECKED,
    FILES_LIVE,
    MAX_FILE_BYTES,
    MAX_LABELS,
    MAX_LABELS_LENGTH,
    QUEUE,
)
from spaces_demo.process import end, import_gradio, interrupt_on_sigterm
from spaces_demo.sample_run import LABELS, SAMPLES, confidence_colour, draw_blocks

gr = import_gradio()

log = logging.getLogger(__name__)
PAGE_WIDTH = 760  # px of the page that is drawn
PAGES = [SAMPLES / "pages" / f"{name}.png" for name in ("dice", "anthology", "edition", "plots")]
PICTURES = [
    SAMPLES / "pictures" / f"{name}.jpg" for name in ("dog", "duck", "panda", "baseball", "screwdriver", "windmill")
]
COMPARED = [PAGES[0], *PICTURES[:3], PAGES[1]]  # what is read at each size says more than a caption does
BEFORE = "The page appears here with its blocks framed, and its text as it is read."
ONE_AT_A_TIME = "model"  # all views share one model and one turn
HEAD_START = 1.0  # s in which a first visitor's page comes before the imports of the model take the interpreter [ours]

HEADER = """<header class="unit-header"><h1>UNIT</h1>
<p><strong>One vision encoder that reads text and recognises pictures.</strong>
Drop a page or a picture below, or click an example.</p></header>"""

CSS = """
.unit-header h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
.unit-header p { margin: .2rem 0 0; color: var(--body-text-color); }
.unit-note { color: var(--body-text-color); opacity: .8; font-size: .9rem; margin: .3rem 0 0; }
.unit-said { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .1rem; color: var(--body-text-color); }
.unit-bars { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr 3rem; gap: .35rem .6rem;
  align-items: center; margin: .8rem 0; color: var(--body-text-color); }
.unit-bars > span { overflow-wrap: anywhere; }
.unit-bars > .unit-figure { font-variant-numeric: tabular-nums; text-align: right; }
.unit-track { background: var(--border-color-primary); border-radius: 4px; height: .8rem; overflow: hidden; }
.unit-track > i { display: block; height: 100%; background: var(--color-accent); }
.unit-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem;
  margin-bottom: .8rem; }
.unit-cards.unit-pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.unit-cards.unit-wide { grid-template-columns: 1fr; }
.unit-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem; margin: 0;
  background: var(--background-fill-primary); color: var(--body-text-color); min-width: 0; }
.unit-card h3 { margin: 0; font-size: 1rem; color: var(--body-text-color); }
.unit-card img { width: 100%; height: auto; display: block; margin: .4rem 0 0; border-radius: 4px; }
.unit-card img.unit-patches { image-rendering: pixelated; }
.unit-card .unit-text { overflow-wrap: anywhere; margin: .5rem 0; color: var(--body-text-color); }
.unit-card .unit-bars { margin: .3rem 0 0; font-size: .9rem; }
.unit-confidence { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; }
.unit-text-read textarea { line-height: 1.45; }
footer .divider { display: none; }
@media (max-width: 480px) { .tab-container button { padding-inline: .55rem !important; } }
"""

# Where the columns stand below each other the results are out of sight when the work begins.
TO_RESULTS = """() => { const shown = [...document.querySelectorAll('.unit-results')].find((one) => one.offsetParent);
if (shown && window.innerWidth < 760) shown.scrollIntoView({ behavior: 'smooth' }); }"""

# The examples are buttons with a picture in them and no word: whoever hears the page is told which is which.
NAME_EXAMPLES = r"""<script>
new MutationObserver(() => {
  for (const picture of document.querySelectorAll('button.gallery-item:not([aria-label]) img[src]')) {
    const name = decodeURIComponent(picture.src.split('/').pop()).replace(/\.\w+$/, '');
    picture.closest('button').setAttribute('aria-label', 'Example: ' + name);
  }
}).observe(document, { childList: true, subtree: true, attributes: true, attributeFilter: ['src'] });
</script>"""

HEAD = (
    '<meta name="description" content="UNIT: one vision encoder that reads text and recognises pictures">'
    + NAME_EXAMPLES
)


def _as_it_came(payload) -> str | None:
    """In place of a component's own `preprocess`: whether a file can be opened is decided with our limits and in our
    words. That it is one that was sent to the app, gradio has checked by then."""
    return None if payload is None or payload.path is None else str(payload.path)


class Loading:
    """The model, loaded in a thread of its own from the first look on; anew where that failed."""

    def __init__(self, load: Callable[[], Any]):
        self._load, self._lock = load, threading.Lock()
        self._future, self._started = Future(), False

    def start(self) -> Future:
        with self._lock:
            if self._future.done() and self._future.exception():
                self._future, self._started = Future(), False
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, args=(self._future,), daemon=True).start()
            return self._future

    def start_later(self) -> None:
        """Start in `HEAD_START` seconds, if nobody has until then."""
        timer = threading.Timer(HEAD_START, self.start)
        timer.daemon = True
        timer.start()

    def _run(self, future: Future) -> None:
        try:
            future.set_result(self._load())
        except BaseException as error:
            future.set_exception(error)

    def get(self) -> Any:
        return self.start().result()

    def wait(self) -> Any:
        """As `get`, but whoever else starts it."""
        return self._future.result()


def load_demo(model: str | None = None, teacher: str | None = None):
    """The model, warm; see [`Demo.load`]. One core is left to the server, unless `OMP_NUM_THREADS` says otherwise: on
    two cores, two threads of torch beside a busy server take several times as long as one."""
    import torch
    from transformers.utils import logging as of_transformers

    from spaces_demo.inference import Demo

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    of_transformers.disable_progress_bar()
    demo = Demo.load(model, teacher)
    demo.warm_up()
    return demo


def guarded(function: Callable) -> Callable:
    """What is refused becomes a message in the page; anything unforeseen is logged here and owned up to there."""

    def told(error: Exception) -> gr.Error:
        from spaces_demo.inference import Refused

        if isinstance(error, Refused):
            return gr.Error(
                html.escape(str(error), quote=False), duration=None, title="Refused", print_exception=False
            )
        log.error("a request failed", exc_info=error)
        return gr.Error(
            "Something went wrong here; it was noted. Try another file.", duration=None, print_exception=False
        )

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapped(*args):
            try:
                yield from function(*args)
            except Exception as error:
                raise told(error) from error
    else:

        @functools.wraps(function)
        def wrapped(*args):
            try:
                return function(*args)
            except Exception as error:
                raise told(error) from error

    return wrapped


# ----------------------------------------------------------------------------------------------------------- rendering


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _img(picture, alt: str, css_class: str = "") -> str:
    """A picture inside the page itself: nothing is left on the disk."""
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=88)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img class="{css_class}" alt="{_escaped(alt)}" src="data:image/webp;base64,{data}">'


def _bar(label: str, value: float) -> str:
    width = 100 * min(1.0, max(0.0, value))
    return (
        f'<span>{_escaped(label)}</span><span class="unit-track" aria-hidden="true"><i style="width:{width:.1f}%"></i>'
        f'</span><span class="unit-figure">{value:.2f}</span>'
    )


def _note(text: str) -> str:
    return f'<p class="unit-note" role="status">{text}</p>'


def reading_note(partial, number: int = 1, pages: int = 1) -> str:
    """How far the reading is, or what came out of it; of a PDF of several pages, which one it is."""
    where = f"Page {number} of {pages} · " if pages > 1 else ""
    page, colour = partial.page, "rgb({}, {}, {})".format(*confidence_colour(partial.page.confidence))
    if partial.done < partial.total:
        return _note(f"{where}Reading: {partial.done} of {partial.total} pieces of the page")
    if not page.blocks:
        return _note(f"{where}Nothing was found to read on this page.")
    words = len(page.text.split())
    said = f"{words} word{'s' * (words != 1)} in {page.seconds:.1f} s · confidence {page.confidence:.2f}"
    return _note(f'<span class="unit-confidence" style="background:{colour}" aria-hidden="true"></span> {where}{said}')


def naming(named) -> str:
    """Caption and bars."""
    said = _escaped(named.caption) or "(nothing)"
    bars = "".join(_bar(one.label, one.likelihood) for one in named.ranking)
    return (
        f'<p class="unit-said">{said}</p><p class="unit-note">caption, confidence {named.confidence:.2f}</p>'
        f'<div class="unit-bars">{bars}</div><p class="unit-note">The bars: how likely the decoder finds each label '
        "as the caption (the geometric mean of its pieces' probabilities).</p>"
    )


def scale_cards(scales, kind: str) -> str:
    """A card for each resolution: the input, its features, what is read, how alike the features are."""
    cards = []
    for one in scales:
        if one.factor == 1:
            usual = "x1" if kind == "picture" else "the height that text is read at"
        else:
            usual = f"{one.factor:g} × " + ("the side of x1" if kind == "picture" else "that height")
        size = f"{one.size[0]} × {one.size[1]} px"
        bars = _bar("UNIT", one.likeness)
        if one.teacher_likeness is not None:
            bars += _bar("teacher", one.teacher_likeness)
        cards.append(
            f'<section class="unit-card"><h3>{size}</h3><p class="unit-note">{usual} · {one.grid[0]} × {one.grid[1]} '
            f"patches</p>{_img(one.picture.resize(one.colours.size), f'the input at {size}')}"
            f"{_img(one.colours, f'features at {size} as colours', 'unit-patches')}"
            f'<p class="unit-text">“{_escaped(one.text) or "(nothing)"}”</p><div class="unit-bars">{bars}</div>'
            "</section>"
        )
    wide = " unit-pairs" if kind == "picture" else " unit-wide"
    return (
        f'<div class="unit-cards{wide}">{"".join(cards)}</div><p class="unit-note">The bars: mean cosine between the '
        "patch features at this resolution and at the usual one; the second stage of training is there to keep it "
        "high. Like colours are like features.</p>"
    )


def inside_cards(found) -> str:
    """A card for each map."""
    rows, cols = found.grid
    maps = [(f"UNIT, layer {found.layer}", found.own)]
    if found.decoded is not None:
        maps.append(("UNIT, by its vision decoder", found.decoded))
    if found.teacher is not None:
        maps.append(("Its teacher", found.teacher))
    cards = "".join(
        f'<section class="unit-card"><h3>{title}</h3>{_img(picture, f"{title}: features as colours over the picture")}'
        "</section>"
        for title, picture in maps
    )
    said = f"{rows} × {cols} patches; the three strongest components of their features as red, green and blue. "
    if found.likeness is not None:
        said += (
            "The second and the third picture have one set of colours: like colours are like features. Mean cosine "
            f"between the two: <strong>{found.likeness:.2f}</strong>."
        )
    elif found.teacher is None:
        said += "This model was loaded without its teacher."
    return f'<div class="unit-cards">{cards}</div><p class="unit-note">{said}</p>'


# ----------------------------------------------------------------------------------------------------------- interface


def build(load: Callable[[], Any] = load_demo) -> gr.Blocks:
    """The app.

    Args:
        load: gives the [`Demo`]; called once, in a thread, when the app is first used or [`launch`]ed.
    """
    loading = Loading(load)

    @guarded
    def read(file, page):
        """Read a page. Of a PDF, the page of that number. Results come as they are read: the last one is whole.

        Returns the page with its blocks framed, the text, how the reading went (HTML), the blocks with box, text and
        confidence (JSON), and the text as a file.
        """
        yield None, "", _note(BEFORE), None, None  # nothing of an earlier page beside this one
        demo = loading.get()
        for image, partial, pages in demo.read(file, page):
            drawn = draw_blocks(image, partial.page.blocks, min(PAGE_WIDTH, image.width), partial.waiting)
            whole = partial.done == partial.total
            yield (
                drawn,
                partial.page.text,
                reading_note(partial, int(page or 1), pages),
                partial.page.to_dict() if whole else gr.skip(),
                _text_file(partial.page.text, file) if whole else None,
            )

    @guarded
    def name(picture, labels):
        """Name a picture: caption, and labels (separated by commas or lines) by how likely they are.

        Returns them as HTML and as JSON.
        """
        named = loading.get().name_picture(picture, labels)
        return naming(named), named.to_dict()

    @guarded
    def scales(picture, kind):
        """One picture at several resolutions (kind "picture"), or the widest line of text in it ("text").

        Returns what is read at each and how alike the features are, as HTML and as JSON.
        """
        found = loading.get().scales(picture, kind)
        return scale_cards(found, kind), [one.to_dict() for one in found]

    @guarded
    def look_inside(picture, layer, strength):
        """The features of one layer as colours over the picture, beside the teacher's.

        Layers count from 1; 0 is the last. Strength: of the colours, 0 to 1. Returns HTML with the maps, and JSON.
        """
        found = loading.get().look_inside(picture, layer or None, strength)
        return inside_cards(found), found.to_dict()

    @guarded
    def about():
        """Which model this is, and the number of its last layer."""
        demo = loading.get()
        said = f"Model: {demo.name}" + (f", {demo.note}" if demo.note else "")
        said = _note(f"{_escaped(said)}. Files that you send are deleted after a quarter of an hour.")
        return said, gr.Slider(maximum=demo.layers, value=demo.layers)

    with gr.Blocks(
        title="UNIT: reads text, recognises pictures",
        analytics_enabled=False,
        delete_cache=(FILES_CHECKED, FILES_LIVE),
    ) as app:
        app.loading = loading
        app.samples = tempfile.TemporaryDirectory(prefix="unit-samples-")  # goes with the app
        kept = Path(app.samples.name)
        for path in (*PAGES, *PICTURES):
            shutil.copyfile(path, kept / path.name)
        gr.HTML(HEADER, padding=False)
        with gr.Tabs():
            with gr.Tab("Read", id="read"):
                with gr.Row():
                    with gr.Column(scale=1, min_width=320):
                        file = gr.File(
                            label=f"Picture or PDF, up to {MAX_FILE_BYTES / 1e6:.0f} MB",
                            file_types=["image", ".pdf"],
                            height=185,
                        )
                        file.preprocess = _as_it_came
                        _describe(file, "The page: a picture or a PDF, as of handle_file.")
                        page = gr.Number(1, label="Page of a PDF", precision=0, minimum=1)
                        _describe(page, "Which page of a PDF, from 1; a picture has one.")
                        button = gr.Button("Read", variant="primary")
                        examples = _examples(PAGES)
                    with gr.Column(scale=2, min_width=320, elem_classes="unit-results"):
                        note = gr.HTML(_note(BEFORE), label="How the reading went", padding=False)
                        with gr.Row():
                            drawn = gr.Image(
                                label="The page and its blocks",
                                format="webp",
                                interactive=False,
                                buttons=["fullscreen"],
                                min_width=300,
                            )
                            with gr.Column(min_width=300):
                                text = gr.Textbox(
                                    label="Text",
                                    lines=14,
                                    max_lines=28,
                                    buttons=["copy"],
                                    interactive=False,
                                    autoscroll=False,
                                    elem_classes="unit-text-read",
                                )
                                download = gr.DownloadButton("Download the text")
                        with gr.Accordion("JSON: blocks with box, text and confidence", open=False):
                            blocks = gr.JSON(label="Blocks", show_label=False, max_height=400)
                described = {"api_name": "read", "api_description": read.__doc__}
                _wire(button, examples, kept, PAGES, file, read, [file, page], [drawn, text, note, blocks, download],
                      described, upload=file.upload, reset=page, enter=page.submit)  # fmt: skip
            with gr.Tab("Name", id="name"):
                with gr.Row():
                    with gr.Column(scale=1, min_width=320):
                        picture = _picture()
                        labels = gr.Textbox(
                            ", ".join(LABELS),
                            label=f"Labels to choose from, up to {MAX_LABELS}, separated by commas",
                            lines=3,
                            max_length=MAX_LABELS_LENGTH,
                        )
                        _describe(labels, "Labels to rank, separated by commas or lines.")
                        button = gr.Button("Name", variant="primary")
                        examples = _examples(PICTURES)
                    with gr.Column(scale=2, min_width=320, elem_classes="unit-results"):
                        said = gr.HTML(_note("Caption and ranking appear here."), label="Caption and bars")
                        with gr.Accordion("JSON", open=False):
                            found = gr.JSON(label="Caption and labels", show_label=False)
                described = {"api_name": "name", "api_description": name.__doc__}
                _wire(button, examples, kept, PICTURES, picture, name, [picture, labels], [said, found], described)
            with gr.Tab("Scales", id="scales"):
                with gr.Row():
                    with gr.Column(scale=1, min_width=320):
                        picture = _picture()
                        kind = gr.Radio(
                            [("all of the picture", "picture"), ("a line of its text", "text")],
                            value="picture",
                            label="Compare",
                        )
                        _describe(kind, "Compare all of the picture, or the widest line of text in it.")
                        button = gr.Button("Compare", variant="primary")
                        examples = _examples(COMPARED)
                    with gr.Column(scale=2, min_width=320, elem_classes="unit-results"):
                        said = gr.HTML(
                            _note(
                                "One input at four resolutions: what is read at each, and how alike its features are."
                            ),
                            label="A card for each resolution",
                        )
                        with gr.Accordion("JSON", open=False):
                            found = gr.JSON(label="Resolutions", show_label=False)
                described = {"api_name": "scales", "api_description": scales.__doc__}
                _wire(button, examples, kept, COMPARED, picture, scales, [picture, kind],
                      [said, found], described, kind=kind)  # fmt: skip
            with gr.Tab("Look inside", id="inside"):
                with gr.Row():
                    with gr.Column(scale=1, min_width=320):
                        picture = _picture()
                        layer = gr.Slider(0, 64, value=0, step=1, label="Layer (0: the last)")
                        strength = gr.Slider(0, 1, value=0.6, step=0.05, label="Strength of the colours")
                        _describe(layer, "Layer of the encoder, from 1; 0 is the last.")
                        _describe(strength, "Of the colours over the picture, 0 to 1.")
                        button = gr.Button("Look inside", variant="primary")
                        examples = _examples([*PICTURES, PAGES[0]])
                    with gr.Column(scale=2, min_width=320, elem_classes="unit-results"):
                        said = gr.HTML(
                            _note("The features of each patch appear here, as colours over the picture."),
                            label="A card for each map",
                        )
                        with gr.Accordion("JSON", open=False):
                            found = gr.JSON(label="Layer, grid and likeness", show_label=False)
                described = {"api_name": "look_inside", "api_description": look_inside.__doc__}
                _wire(button, examples, kept, [*PICTURES, PAGES[0]], picture, look_inside, [picture, layer, strength],
                      [said, found], described)  # fmt: skip
        model_note = gr.HTML(_note("Loading the model…"), label="The model", padding=False)
        app.load(
            about, None, [model_note, layer], api_name="about", api_description=about.__doc__, show_progress="hidden"
        )
    app.queue(max_size=QUEUE, default_concurrency_limit=4)
    return app


def _picture() -> gr.Image:
    picture = gr.Image(
        label="A picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260, buttons=[]
    )
    picture.preprocess = _as_it_came
    _describe(picture, "The picture, as of handle_file.")
    return picture


def _describe(component, text: str) -> None:
    """What the API's documentation says of a parameter, in place of gradio's words on the component's type."""
    plain = component.api_info_as_input
    component.api_info_as_input = lambda: plain() | {"additional_description": text}


def _examples(paths: list[Path]) -> gr.Dataset:
    return gr.Dataset(
        components=[gr.Image(visible=False, render=False)],
        samples=[[str(path)] for path in paths],
        label="Examples: click one",
        type="index",
        layout="gallery",
        samples_per_page=len(paths),
    )


def _wire(button, examples, kept, paths, source, function, inputs, outputs, described, upload=None, reset=None,
          kind=None, enter=None) -> None:  # fmt: skip
    """The button (which is the endpoint), a click on an example and, for Read, a file that was dropped do the same.

    Args:
        kept: folder with the copies of the examples, `paths` in it.
        source: the component that takes the file; a click on an example puts the example there.
        upload: event on which the work starts as well.
        reset: a number set to 1 by an example.
        kind: Scales' choice, set to what suits the example.
        enter: event of the Enter key in a field, which does what the button does.
    """
    shared = {"concurrency_id": ONE_AT_A_TIME, "concurrency_limit": 1, "show_progress_on": outputs[0]}
    button.click(function, inputs, outputs, **shared, **described)
    for begin in (button.click, examples.click):
        begin(None, None, None, js=TO_RESULTS, api_visibility="private")
    for event in (upload, enter):
        if event is None:
            continue
        event(function, inputs, outputs, **shared, api_visibility="private")

    def put(index):
        values = [str(kept / paths[index].name)]
        values += [1] if reset is not None else []
        values += ["text" if paths[index] in PAGES else "picture"] if kind is not None else []
        return values if len(values) > 1 else values[0]

    targets = [one for one in (source, reset, kind) if one is not None]
    examples.click(put, examples, targets, queue=False, show_progress="hidden", api_visibility="private").then(
        function, inputs, outputs, **shared, api_visibility="private"
    )


def _text_file(text: str, source: str | None) -> str | None:
    """The text as a file among gradio's own, which are deleted in time."""
    if not text:
        return None
    from gradio.processing_utils import save_bytes_to_cache
    from gradio.utils import get_upload_folder

    stem = "".join(c for c in Path(source or "page").stem if c.isalnum() or c in "-_ .")[:80].strip(" .") or "page"
    return save_bytes_to_cache(text.encode("utf-8"), f"{stem}.txt", get_upload_folder())


def theme() -> gr.themes.Base:
    """Fonts of the visitor's own machine: nothing is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )


def launch(app: gr.Blocks, host: str | None = None, port: int | None = None, **kwargs) -> None:
    """Serve the app from threads of its own, and only then load the model. `kwargs` as of gradio's `launch`."""
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=False,
        allowed_paths=[],
        max_file_size=MAX_FILE_BYTES,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=["api"],
        theme=theme(),
        css=CSS,
        head=HEAD,
        prevent_thread_lock=True,
        **kwargs,
    )
    app.loading.start_later()


if __name__ == "__main__":
    interrupt_on_sigterm()
    space = build()
    try:
        launch(space)
        space.block_thread()
    except KeyboardInterrupt:
        pass
    end(space)
