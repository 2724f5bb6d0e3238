"""The demo's process: gradio imported without work that only editors need, and an end that is one even mid-work."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from types import ModuleType
from typing import Any

STUBS = "gradio.component_meta"


def import_gradio() -> ModuleType:
    """gradio, imported without its writing of stub files for editors: parsing the source of each component for them is
    nearly half of the import [measured]. A gradio that does this elsewhere is imported as it is."""
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    try:
        import gradio
    finally:
        sys.meta_path.remove(finder)
    return gradio


class _WithoutStubs(importlib.abc.MetaPathFinder):
    looking = False

    def find_spec(self, name, path=None, target=None):
        if name != STUBS or self.looking:
            return None
        self.looking = True  # the search below asks this finder too
        spec = importlib.util.find_spec(name)
        self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_without_stubs(module) -> None:
                execute(module)
                if hasattr(module, "create_or_modify_pyi"):
                    module.create_or_modify_pyi = lambda *_: None

            spec.loader.exec_module = execute_without_stubs
        return spec


def interrupt_on_sigterm() -> None:
    """A process that is told to end does what it does on Ctrl+C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def end(app: Any, status: int = 0) -> None:
    """Stop serving, delete what visitors sent, and end the process; does not return.

    Threads that read a page or load the model are not waited for: Python's own end would take their C++ frames apart
    under them and abort.
    """
    from gradio.route_utils import delete_files_created_by_app

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl+C must not stop the cleaning up
    try:
        app.close(verbose=False)
        delete_files_created_by_app(app, age=None)
        app.samples.cleanup()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
