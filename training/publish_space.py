"""The demo to a Space on the Hugging Face Hub: `unit push-space`. One commit, and the variable that names the model.

    publish_space("me/unit-demo", "me/my-unit")

What goes up is `spaces_demo/` with its samples, `modeling_unit/` without checkpoints, and of our other packages the
modules that those import. `README.md` and `requirements.txt` stand at the root, where a Space looks for them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .publish import (
    CHECK,
    CONFIG,
    README,
    Published,
    PublishError,
    _api,
    check_access,
    check_repo_id,
    explained,
    hand_over,
    workplace,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_unit", "configuration_unit", "training", "unit_cli", "spaces_demo")
STARTS = ("app", "inference", "limits", "process", "sample_run")  # modules of the Space
OWN_FILES = re.compile(rf"^({'|'.join(PACKAGES)})/|^requirements\.txt$")  # what an earlier push may have left
VARIABLE = "UNIT_MODEL_ID"
APP = "spaces_demo/app.py"
ENDPOINTS = {"/read", "/name", "/scales", "/look_inside", "/about"}
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
STARTS_WITHIN = 300  # s for the check, which takes some; more, and it hangs [ours]
# In a process without our packages on its path: what a Space does up to the first page, and all that it imports later.
STARTED_AS_A_SPACE = """
import json, re, runpy, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

root, packages = Path(sys.argv[1]), sys.argv[2].split(",")
app = runpy.run_path(str(root / sys.argv[3]), run_name="space")
named = app["build"]().get_api_info()["named_endpoints"]
import spaces_demo.inference
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] in packages and file and not Path(file).resolve().is_relative_to(root.resolve()):
        raise ImportError(f"{name} is not among the Space's files")
others = []
for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines():
    name, pinned, wanted = line.partition("==")
    if pinned and not line.startswith("#"):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found.partition("+")[0] != wanted.strip():
            others.append(f"{name} {found} instead of {wanted.strip()}")
print(json.dumps({"endpoints": sorted(named), "others": others}))
"""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def publish_space(
    repo_id: str,
    model_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    overwrite_card: bool = False,
    api: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> Published:
    """Publish the demo of a model as a Space.

    Args:
        repo_id: `OWNER/NAME` of the Space; made, with Gradio, when it does not exist.
        model_id: full UNIT model on the Hub; the Space's variable `UNIT_MODEL_ID` is set to it.
        private: make the Space private. create_pr: open a pull request.
        revision: branch to commit to, made when it does not exist. A Space runs its default branch alone, so here, as
            with a pull request, the variable is left as it is.
        overwrite_card: also where the Space's card was edited by hand; without, only what starts the app is renewed.
        dry_run: do all but upload and leave the files, named in the result; no network, the model is not looked at.
        api, say: as of `publish`.

    Raises:
        PublishError: no such model, one without weights, one that cannot read; an app that does not start from its
            files; no token or no right, no connection, a race with another push. The Space's branch is as it was.
    """
    check_repo_id(repo_id)
    check_repo_id(model_id)
    if not dry_run:
        api = api or _api()
        with explained(repo_id, api):
            check_access(api, repo_id, private, create_pr, repo_type="space")
        with explained(model_id, api):
            if check_model(api, model_id):
                say(f"{model_id} is not public: give the Space a secret HF_TOKEN that may read it")
    with workplace("unit-space-", dry_run) as work:
        folder = work / "space"
        write_space(folder, repo_id, model_id)
        say("starting the app from these files in a clean process")
        others = check_space(folder, model_id, work / CHECK)
        if others:
            say(f"the Space installs other versions than the app was just started with: {'; '.join(others)}")
        done = hand_over(
            folder,
            repo_id,
            api,
            dry_run,
            say,
            "the Space ",
            private=private,
            create_pr=create_pr,
            revision=revision,
            repo_type="space",
            own_files=OWN_FILES,
            overwrite_card=overwrite_card,
            # a new Space has the variable from the start, or it would begin with a model that is not there
            new_repository={"space_sdk": "gradio", "space_variables": [{"key": VARIABLE, "value": model_id}]},
        )
        if not dry_run and (create_pr or revision is not None):
            say(f"the variable {VARIABLE} of {repo_id} is left as it is: its owner sets it to {model_id}")
        elif not dry_run:
            with explained(repo_id, api):
                set_variable(api, repo_id, model_id)
        return done


def check_model(api: Any, model_id: str) -> bool:
    """Whether a model is private or gated, so that the Space needs a token for it.

    Raises:
        PublishError: there is none, without weights in safetensors, or not a full UNIT model.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(model_id)
    except RepositoryNotFoundError:
        raise PublishError(f"{model_id}: no such model on the Hub, or the token may not see it") from None
    names = {each.rfilename for each in info.siblings or []}
    if not names.intersection(WEIGHTS):
        raise PublishError(f"{model_id}: has no weights (no {WEIGHTS[0]}); push the model first")
    kind = None
    if CONFIG in names:
        kind = json.loads(Path(api.hf_hub_download(model_id, CONFIG, revision=info.sha)).read_text("utf-8"))
        kind = kind.get("model_type") if isinstance(kind, dict) else None
    if kind != "unit":
        raise PublishError(f"{model_id}: the Space reads text: it needs a full UNIT model, this one is {kind!r}")
    return bool(info.private or info.gated)


def set_variable(api: Any, repo_id: str, model_id: str) -> None:
    """Name the model to the Space, which restarts; nothing is done where it is named already."""
    there = api.get_space_variables(repo_id).get(VARIABLE)
    if there is None or there.value != model_id:
        api.add_space_variable(repo_id, VARIABLE, model_id)


def write_space(folder: Path, repo_id: str, model_id: str) -> None:
    """Write into `folder`, which is made, what a Space's repository holds."""
    demo = ROOT / "spaces_demo"
    chosen = needed_modules() | set((ROOT / "modeling_unit").glob("*.py"))
    chosen |= {path for path in (demo / "samples").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    for path in sorted(chosen):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(demo / "requirements.txt", folder / "requirements.txt")
    card = (demo / README).read_text(encoding="utf-8")
    head, front, text = card.split("---\n", 2)
    text = text.replace('Client("OWNER/SPACE")', f'Client("{repo_id}")')
    (folder / README).write_text(f"{head}---\n{front}models:\n  - {model_id}\n---\n{text}", encoding="utf-8")


def check_space(folder: Path, model_id: str, work: Path) -> list[str]:
    """Import the app of a Space's files and build its interface, in a process where our packages are only those of the
    files, without network or token. The model is not loaded.

    Returns:
        Packages that are here in another version than the Space's requirements pin, or not at all, in words.

    Raises:
        PublishError: it does not start; the message ends with the reason.
    """
    work.mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key not in TOKENS}
    environment |= {VARIABLE: model_id, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    environment |= {"TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-I", "-B", "-c", STARTED_AS_A_SPACE, str(folder), ",".join(PACKAGES), APP]
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=STARTS_WITHIN, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PublishError(f"the app does not start from these files: nothing in {STARTS_WITHIN} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {done.returncode}"
        if last == "ModuleNotFoundError: No module named 'gradio'":
            last = "gradio is missing here: pip install 'unit-vision[demo]'"
        raise PublishError(f"the app does not start from these files: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if lacking := ENDPOINTS - set(found["endpoints"]):
        raise PublishError(f"the app has no endpoint {', '.join(sorted(lacking))}")
    return found["others"]


def needed_modules() -> set[Path]:
    """Files of our packages that the Space imports, whether at the top of a module or inside a function."""
    waiting = [f"spaces_demo.{name}" for name in STARTS]
    found: set[Path] = set()
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None:  # an attribute of a module
            continue
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # importing it runs the packages that it lies in
        if path in found:
            continue
        found.add(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                start = ".".join([*parts, *([node.module] if node.module else [])])
                waiting += [start, *(f"{start}.{each.name}" for each in node.names)]
    return found


def _file_of(name: str) -> Path | None:
    if name.partition(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None
