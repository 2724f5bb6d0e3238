"""Where lmms-eval runs: here, if it is installed here, else in an environment of its own in the cache.

It cannot be one of this package's extras: lmms-eval 0.7.3 pins wandb 0.25.0, which wants protobuf below 7, where the
tested set has protobuf 7; it asks for torchvision, timm and forty more that its pictures' tasks never import; and one
of them has no wheel. Its own environment sees the packages of this one (the same torch, the same transformers), and
has lmms-eval and what it imports besides.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from training.evaluation.contract import NotMeasured
from training.evaluation.peers.environment import install_packages, python_of, record_of

VERSION = "0.7.3"  # the one that was read and run
# One for each Python: compiled packages do not go from one to the next
NAME = f"lmms-eval-{VERSION}-python{sys.version_info[0]}.{sys.version_info[1]}"
# What `python -m lmms_eval` imports for tasks of pictures and marks answers with, besides what `[train]` brings
# [found by running it]
PACKAGES = (
    "aiohttp",
    "dill",
    "evaluate==0.4.6",
    "httpx",
    "jinja2",
    "Levenshtein",  # MathVista
    "loguru",
    "openai",  # tasks that a language model marks
    "pandas",
    "pydantic",
    "pytablewriter[html]",
    "pytz",
    "requests",
    "sacrebleu==2.6.0",
    "scipy",
    "tenacity",
)


def install(progress: bool = True) -> Path:
    """Make the environment, unless it is there; returns its folder.

    Raises:
        RuntimeError: packages that cannot be had; one line.
    """
    return install_packages(NAME, PACKAGES, progress, alone=[f"lmms-eval=={VERSION}"], inherit=True)


def python(given: str | None = None) -> str:
    """The interpreter that has lmms-eval: the given one, this one, or that of the environment.

    Raises:
        NotMeasured: none has it; the message says what to do.
    """
    if given is not None:
        asked = "import importlib.util as u, sys; sys.exit(u.find_spec('lmms_eval') is None)"
        try:
            missing = subprocess.run([given, "-c", asked], capture_output=True).returncode
        except OSError as error:
            raise NotMeasured(f"--python {given}: cannot be started ({error.strerror})") from error
        if missing:
            raise NotMeasured(f"--python {given}: there is no lmms-eval there")
        return given
    if find_spec("lmms_eval") is not None:
        return sys.executable
    if record_of(NAME) is not None:
        return str(python_of(NAME))
    raise NotMeasured("lmms-eval is not installed; `unit lmms --install` makes an environment for it")


def version_of(python: str) -> str:
    """The version of lmms-eval that an interpreter has; "unknown" where it does not say."""
    asked = "from importlib.metadata import version; print(version('lmms-eval'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
