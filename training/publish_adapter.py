"""A run's LoRA adapter to the Hub: `unit push --adapter`. As in `publish.py`: export, check, upload in one commit.

    publish_adapter("runs/my-lora", "me/my-adapter", base="me/my-base")

Nothing is uploaded unless `PeftModel.from_pretrained`, in a clean process and on the base that the card names, gives
what the run's adapter gives on the base that it was trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from modeling_unit.hub_unit import FULL_AUTO_MAP, write_code

from . import card as cards
from . import clean_process
from .adapter import adapter_of, export_adapter, is_folder, load_base, other_base, put_on, read_settings
from .errors import first_line
from .publish import (
    CHECK,
    CONFIG,
    ExportDiffers,
    Published,
    PublishError,
    _api,
    _write_json,
    check_access,
    check_repo_id,
    explained,
    hand_over,
    probe_picture,
    public_recipe,
    run_clean_process,
    workplace,
)

TOLERANCE = 1e-5  # of the largest output, or of 1: two ways of loading may multiply in another order [ours]
BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md"]  # no pickle, no code


def publish_adapter(
    source: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    license: str | None = None,
    overwrite_card: bool = False,
    replace: bool = False,
    api: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> Published:
    """Export a run's adapter, check it in a clean process, and upload it in one commit.

    Args:
        source: folder of a run, or of an adapter.
        base: id on the Hub of the base model, where the run started from a folder; its weights must be those of that
            folder. A base on the Hub is fetched; none of its code is run.
        dry_run: do all but upload, without network: a base on the Hub must be in the cache.
        license: by default what the base's card says.
        repo_id, private, create_pr, revision, overwrite_card, replace, api, say: as of [`publish`].

    Raises:
        PublishError: no adapter, no base that others can fetch, no token or no right, no connection, an adapter that
            gives something else on the published base ([`ExportDiffers`]), a race with another push. The branch is as
            it was.
    """
    source = Path(source)
    check_repo_id(repo_id)
    if base is not None:
        check_repo_id(base)
    if not source.is_dir():
        raise PublishError(f"{source}: no such folder; name the folder of a run or of an adapter")
    with workplace("unit-push-", dry_run) as work:
        folder = work / "export"
        try:
            settings = read_settings(adapter_of(source))
            recorded, commit = settings.get("base_model_name_or_path"), settings.get("revision")
            if repo_id == (base or recorded):
                raise PublishError(f"{repo_id}: is the base; an adapter goes into a repository of its own")
            if not recorded:
                raise PublishError(f"{source}: the adapter does not say which model it was trained on")
            say(f"exporting the adapter of {source}")
            if base is None and is_folder(recorded):  # says what to do, before anything is asked of the Hub
                export_adapter(source, folder, None, license, local_files_only=True)
            if not dry_run:
                api = api or _api()
                with explained(repo_id, api):
                    check_access(api, repo_id, private, create_pr)
            export_adapter(source, folder, base, license, local_files_only=dry_run)
            recipe = cards._json(folder / cards.RECIPE)
            if recipe is not None:
                _write_json(folder / cards.RECIPE, public_recipe(recipe))
            trained_on = _base_folder(recorded, commit, api, dry_run)
            named = trained_on if base is None else _base_folder(base, None, api, dry_run)
            if other_base(adapter_of(source), named):
                say(f"{base or recorded} does not hold the weights that the adapter was trained on")
            say("checking the adapter on its base in a clean process")
            check_adapter(adapter_of(source), trained_on, folder, named, work / CHECK)
        except PublishError:
            raise
        except ValueError as error:
            raise PublishError(first_line(error)) from error
        where = {"private": private, "create_pr": create_pr, "revision": revision}
        where |= {"overwrite_card": overwrite_card, "replace": replace}
        return hand_over(folder, repo_id, api, dry_run, say, **where)


def _base_folder(base: str, commit: str | None, api: Any, local_files_only: bool) -> Path:
    """The folder of a base; of one on the Hub, its files in the cache."""
    if is_folder(base):
        if not Path(base).is_dir():
            raise PublishError(f"{base}: the base model that the adapter was trained on is not there any more")
        return Path(base)
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    api = api or _api()
    with explained(base, api):
        try:
            return Path(
                api.snapshot_download(
                    base, revision=commit, allow_patterns=BASE_FILES, local_files_only=local_files_only
                )
            )
        except RepositoryNotFoundError:
            raise PublishError(f"{base}: no such model on the Hub, or the token may not see it") from None
        except LocalEntryNotFoundError:
            if not local_files_only:
                raise
            raise PublishError(f"{base}: the base is not in the cache, and a dry run fetches nothing") from None


@torch.no_grad()
def check_adapter(adapter: Path, trained_on: Path, folder: Path, named: Path, work: Path) -> None:
    """Compare what an adapter gives in memory on the model that it was trained on with what the exported `folder`
    gives on the base `named`: loaded by peft in a clean process, without network or token, with our code in place of
    the base's own. Both in float32.

    Raises:
        ExportDiffers: it does not load there, or gives something else; the message says what.
        ValueError: the adapter does not fit the model that it was trained on.
    """
    work.mkdir(parents=True)
    model_class = (read_settings(adapter).get("auto_mapping") or {}).get("base_model_class")
    model, missing = load_base(str(trained_on), None, model_class)
    llava = model.config.model_type == "llava"
    try:
        processor = AutoProcessor.from_pretrained(trained_on, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{trained_on}: no processor can be loaded from there: {first_line(error)}") from error
    if llava:
        inputs = dict(processor(images=probe_picture(), text=processor.image_token, return_tensors="pt"))
    else:
        task = min(processor.task_prompts, key=lambda each: (each != "ocr", each))
        inputs = dict(processor(images=[probe_picture()], task=task))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, str(work / "inputs.safetensors"))
    wrapped, _ = put_on(model, adapter, missing)
    expected = clean_process.adapted(wrapped.eval(), inputs)
    del model, wrapped
    job = {"kind": "adapter", "folder": str(folder), "inputs": str(work / "inputs.safetensors"), "remote": not llava}
    job["auto_class"] = "AutoModelForImageTextToText" if llava else "AutoModelForPreTraining"
    job["base"] = str(_with_our_code(named, work / "base"))
    found, _ = run_clean_process(job, work)
    differences = []
    for name, tensor in expected.items():
        other = found.get(name)
        if other is None or other.shape != tensor.shape:
            shape = None if other is None else tuple(other.shape)
            differences.append(f"{name}: {shape or 'nothing'} instead of {tuple(tensor.shape)}")
            continue
        if not torch.isfinite(tensor).all():
            raise PublishError(f"{adapter}: the {name} are not finite; such an adapter is of no use to anybody")
        gap = float((tensor - other).abs().max())
        if not gap <= TOLERANCE * max(1.0, float(tensor.abs().max())):
            differences.append(f"{name}: by up to {gap:.3g}")
    if differences:
        raise ExportDiffers(
            "the adapter on the base that its card names does not give what it gives on the model that it was trained "
            f"on: {'; '.join(differences)}; is that the same model, in the same precision?"
        )


def _with_our_code(base: Path, folder: Path) -> Path:
    """A base as a folder whose weights are links, and whose code, where it has any, is ours."""
    folder.mkdir()
    for file in sorted(base.iterdir()):
        if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json"):
            (folder / file.name).symlink_to(file.resolve())
        elif file.name == "generation_config.json":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    if config.get("model_type") == "unit":
        config["auto_map"] = FULL_AUTO_MAP
        write_code(folder)
    _write_json(folder / CONFIG, config)
    return folder
