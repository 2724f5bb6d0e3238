"""`unit demo`: the browser demo on this machine."""

from __future__ import annotations

import argparse
import os
import threading
import time

from .common import CommandError, first_line, quiet


def add_parser(subparsers) -> None:
    """Add `demo` to the sub-parsers of `unit`."""
    parser = subparsers.add_parser(
        "demo",
        help="open the browser demo on this machine",
        description="Serve the browser demo: read a page, name a picture, compare scales, look inside. Nothing leaves "
        "this machine, and only it can reach the page unless --host says otherwise.",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a folder or an id on the Hugging Face Hub (default: the environment's UNIT_MODEL_ID, else the shipped "
        "unit-tiny)",
    )
    parser.add_argument(
        "--teacher",
        metavar="FOLDER_OR_ID",
        help="the encoder that the model was trained to agree with (default: UNIT_TEACHER_ID, else the shipped "
        "model's own)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=_port, help="port to serve on (default: the first free one from 7860)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def _port(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    model = args.model or os.environ.get("UNIT_MODEL_ID") or None
    quiet(model)
    try:
        from spaces_demo import app, process
    except ImportError as error:
        raise CommandError(f"gradio is missing: pip install 'unit-vision[demo]' ({first_line(error)})") from error
    built = app.build(lambda: app.load_demo(model, args.teacher))
    if threading.current_thread() is threading.main_thread():
        process.interrupt_on_sigterm()
    try:
        try:
            app.launch(built, args.host, args.port, inbrowser=args.open, quiet=True)
        except OSError as error:
            raise CommandError(f"cannot serve on {args.host}: {first_line(error)}") from error
        print(f"UNIT is at {built.local_url} (Ctrl+C ends it); the model is loading", flush=True)
        try:
            demo = built.loading.wait()
        except Exception as error:
            name = model or "the shipped checkpoint"
            raise CommandError(f"{name}: cannot be loaded for the demo: {first_line(error)}") from error
        print(f"{demo.name} is ready", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        process.end(built)  # the ordinary end
    finally:
        built.close(verbose=False)  # deletes what was sent
    return 0
