"""From a run to a repository on the Hugging Face Hub: export, check in a clean process, upload in one commit.

    publish("runs/my-run", "me/my-unit")        # what `unit push` and `push_to_hub: true` of a recipe do

Nothing is uploaded unless the exported folder, loaded where none of our packages is, gives bit for bit what the model
gives in memory: every weight, the encoder's tokens, and the text read from a small picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoProcessor

from modeling_unit import UnitConfig, UnitImageProcessor, UnitVisionConfig
from modeling_unit.architectures_unit import ARCHITECTURES, prefix_tokens, run_encoder
from modeling_unit.image_processing_unit import load_image_processor
from modeling_unit.vision_sources_unit import save_encoder

from . import card as cards
from . import clean_process
from .card_plots import plot_retention, plot_scales
from .errors import first_line
from .evaluation.hub_results import eval_result_files
from .evaluation.plots import plot_suite
from .evaluation.report import SUITE_TITLES, load_results, report_text
from .version import code_version

MAX_SHARD_SIZE = "5GB"  # [ours]; transformers' own is ten times as much, which nobody wants to fetch twice
CHECK = "check"  # in a workplace: what the clean process is given and gives
CONFIG, PREPROCESSOR, README = "config.json", "preprocessor_config.json", "README.md"
RESULTS, REPORT = "results.json", "report.md"  # of `unit evaluate`
# Files that an earlier push of ours may have left and that this one replaces as a whole
OWN_FILES = re.compile(
    r"^([^/]*_unit\.py|[^/]*\.safetensors|[^/]*\.safetensors\.index\.json|evaluation/.*|\.eval_results/unit-[^/]*)$"
)
# ... and those that make it another kind of repository, where this push changes that
OTHER_KINDS = re.compile(
    r"^((adapter_|generation_|processor_|preprocessor_|tokenizer_)?config\.json|tokenizer\.json|chat_template\.jinja)$"
)
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")  # what the Hub's tokens look like
NO_TOKEN = "no token: log in with `hf auth login`, or set HF_TOKEN to one with the right to write"
REASONS = {  # what the Hub's statuses mean here
    401: "the Hub does not know the token: log in again with `hf auth login`",
    403: "the token has no right to write to {repo_id}",
    409: "{repo_id}: the name is taken, or changing at this moment",
    412: "{repo_id}: the branch moved while this push was under way; run it again",
}
HUB_SETTINGS = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")


class PublishError(ValueError):
    """The push cannot go on; nothing was uploaded. The message says what to do."""


class ExportDiffers(PublishError):
    """What was exported does not give what the model in memory gives."""


@dataclass
class Published:
    """What a push did.

    Args:
        repo_id: where it went. folder: of a dry run, the export, left for a look.
        commit: of the branch as it is now, `None` after a dry run. url: of the commit or pull request.
        uploaded: paths that changed; empty if the repository held it all already.
        files: path -> size in bytes of everything exported.
        kept: paths that the repository holds in another form and that were left as they are: a card edited by hand; of
            a Space's, which is then among `uploaded` too, what starts the app may have been renewed.
    """

    repo_id: str
    folder: Path | None = None
    commit: str | None = None
    url: str | None = None
    uploaded: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def publish(
    source: str | Path,
    repo_id: str,
    *,
    encoder_only: bool = False,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    evaluation: str | Path | None = None,
    license: str = "apache-2.0",
    overwrite_card: bool = False,
    replace: bool = False,
    api: Any = None,
    say: Callable[[str], None] = lambda line: None,
) -> Published:
    """Export a run, check the export in a clean process, and upload it in one commit.

    Args:
        source: folder of a run or of a model: a full UNIT model, or an encoder alone.
        repo_id: `OWNER/NAME`; made when it does not exist.
        encoder_only: of a full model, only its encoder.
        private: make the repository private. create_pr: open a pull request instead of committing to the branch.
        revision: branch to commit to, made from the default one when it does not exist.
        dry_run: do all but upload, without network; the folder is left and named in the result.
        evaluation: folder of `unit evaluate`; by default `source/evaluation`, if it is there.
        license: of the weights, as the Hub names it.
        overwrite_card: also where the repository's card is not as an earlier push wrote it; without, it is kept.
        replace: also where the repository holds something else: an adapter, a full model, an encoder alone.
        api: `huggingface_hub.HfApi`, with an endpoint and a token of its own.
        say: is told what is being done, a line at a time.

    Raises:
        PublishError: no such model, no token or no right, no connection, an export that differs ([`ExportDiffers`]),
            a race with another push. The branch is as it was.
    """
    source = Path(source)
    check_repo_id(repo_id)
    model, processor, kind = load_source(source, encoder_only)
    if not dry_run:
        api = api or _api()
        with explained(repo_id, api):
            check_access(api, repo_id, private, create_pr)
    with workplace("unit-push-", dry_run) as work:
        folder = work / "export"
        say(f"exporting {source}")
        facts, expected = export(model, processor, kind, source, folder, evaluation, license)
        del model
        if not (folder / "evaluation").is_dir():
            say(
                f"no evaluation beside {source}: the card will have no figures (`unit evaluate MODEL --out FOLDER` "
                "measures them, --evaluation FOLDER names them)"
            )
        say("checking the export in a clean process")
        check_export(folder, facts, expected, work / CHECK)
        (folder / README).write_text(str(cards.make_card(folder, repo_id, facts)), encoding="utf-8")
        where = {"private": private, "create_pr": create_pr, "revision": revision}
        where |= {"overwrite_card": overwrite_card, "replace": replace}
        return hand_over(folder, repo_id, api, dry_run, say, **where)


@contextmanager
def workplace(prefix: str, keep: bool) -> Iterator[Path]:
    """A folder for the time of a push, with what is to be uploaded and, under `CHECK`, what the check leaves. `keep`:
    what is to be uploaded stays when all went well."""
    work, well = Path(tempfile.mkdtemp(prefix=prefix)), False
    try:
        yield work
        well = True
    finally:
        shutil.rmtree(work / CHECK, ignore_errors=True)
        if not (keep and well):
            shutil.rmtree(work, ignore_errors=True)


def hand_over(
    folder: Path, repo_id: str, api: Any, dry_run: bool, say: Callable[[str], None], what: str = "", **where
) -> Published:
    """The last step of every push: no token among the files, then [`upload`] with `where`, or only what they are."""
    (folder / README).write_text(cards.signed((folder / README).read_text(encoding="utf-8")), encoding="utf-8")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    refuse_secrets(folder, None if api is None else _token(api))
    if dry_run:
        return Published(repo_id, folder=folder, files=files)
    say(f"uploading to {what}{repo_id}")
    with explained(repo_id, api):
        done = upload(folder, repo_id, api, **where)
    done.files = files
    return done


# -- what is published --------------------------------------------------------------------------------------------


def load_source(source: Path, encoder_only: bool) -> tuple[Any, Any, str]:
    """The model of a folder in memory, in the dtype of its weights, its processor, and "full" or "encoder".

    Raises:
        PublishError: no folder, no model in it, an adapter, a model that this command does not publish.
    """
    if not source.is_dir():
        raise PublishError(f"{source}: no such folder; name the folder of a run or of a saved model")
    if (source / "adapter_config.json").is_file():
        raise PublishError(
            f"{source}: a PEFT adapter, not a whole model; `unit push --adapter` publishes it, `unit merge` puts it "
            "into its base"
        )
    if not (source / CONFIG).is_file():
        raise PublishError(f"{source}: no model there (the folder has no {CONFIG}); a run has one when it is finished")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        if isinstance(config, UnitConfig):
            # without the auxiliary head of training
            model = AutoModelForPreTraining.from_pretrained(
                source, num_character_classes=0, dtype="auto", use_safetensors=True, local_files_only=True
            )
            processor = AutoProcessor.from_pretrained(source, local_files_only=True)
            if not encoder_only:
                return model.eval(), processor, "full"
            return model.vision_model.eval(), processor.image_processor, "encoder"
        if config.model_type in ARCHITECTURES:
            model = AutoModel.from_pretrained(source, dtype="auto", use_safetensors=True, local_files_only=True)
            processor = None
            if (source / PREPROCESSOR).is_file():
                processor = load_image_processor(source, local_files_only=True)
            return model.eval(), processor, "encoder"
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PublishError(f"{source}: cannot be loaded: {first_line(error)}") from error
    if config.model_type == "llava":
        raise PublishError(
            f"{source}: a LLaVA, which this command does not check or describe; `hf upload OWNER/NAME {source}` "
            "uploads it as it is, and `unit push --adapter` a LoRA adapter of one"
        )
    raise PublishError(
        f"{source}: a model of type {config.model_type!r}; published are UNIT models and encoders: unit, "
        f"{', '.join(sorted(ARCHITECTURES))}"
    )


@torch.no_grad()
def export(
    model: Any,
    processor: Any,
    kind: str,
    source: Path,
    folder: Path,
    evaluation: str | Path | None = None,
    license: str = "apache-2.0",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write all but the card into `folder`: weights, configuration, code, processor, tokenizer, the run's papers.

    Returns:
        facts: what the card says of the model, see `card.make_card`. expected: what the model gives in memory,
        `tensors` and `words` as in `clean_process`.

    Raises:
        PublishError: an evaluation that is none, a model whose output is not finite.
    """
    full = kind == "full"
    encoder = model.vision_model if full else model
    ours = isinstance(encoder.config, UnitVisionConfig)
    picture = probe_picture()
    tensors: dict[str, torch.Tensor] = {}
    words: dict[str, Any] = {"problems": [], "weights": clean_process.fingerprints(model)}
    folder.mkdir(parents=True)
    if full:
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        tensors, words["text"] = clean_process.read(model, processor, picture)
    elif ours:
        images = processor or UnitImageProcessor(patch_size=encoder.config.patch_size)
        save_encoder(encoder, folder, images, max_shard_size=MAX_SHARD_SIZE)
    else:
        unit_images = processor if isinstance(processor, UnitImageProcessor) else None
        save_encoder(encoder, folder, unit_images, max_shard_size=MAX_SHARD_SIZE)
        if processor is not None and unit_images is None:
            processor.save_pretrained(folder)  # the encoder's own, as it was
    image_processor = getattr(processor, "image_processor", processor)
    if not full and not ours:
        image_processor = load_image_processor(folder)
    elif not full:
        image_processor = images
    clip = None
    if not full and ours and isinstance(images, UnitImageProcessor):
        clip = add_clip_settings(folder / PREPROCESSOR, encoder.config, images)
    inputs = clean_process.inputs_of(image_processor, picture, encoder.dtype)
    tensors["pixels"] = inputs["pixel_values"]
    tensors["tokens"] = (run_encoder(encoder, **inputs) if full else encoder(**inputs)).last_hidden_state
    if clip:
        from modeling_unit.llava_unit import clip_image_processor

        squares = clip_image_processor(clip, images.image_mean, images.image_std, images.do_normalize)
        inputs = clean_process.inputs_of(squares, picture, encoder.dtype)
        tensors["tokens, CLIPImageProcessor"] = encoder(**inputs).last_hidden_state
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PublishError(f"{source}: the model's {name} are not finite; such a model is of no use to anybody")
    _forget_paths(folder / CONFIG)
    _copy_papers(source, folder, evaluation, full)
    if isinstance(image_processor, UnitImageProcessor):
        _draw_picture(encoder, image_processor, folder / cards.PICTURE)
    prompt = ""
    if full:
        tasks = sorted(processor.task_prompts, key=lambda task: (task != "ocr", task))
        prompt = processor.image_token + processor.task_prompts[tasks[0]]
    facts = {
        "kind": kind,
        "remote": full or ours,
        "clip": clip,
        "parts": cards.parameter_table(model, full),
        "patch_size": encoder.config.patch_size,
        "width": encoder.config.hidden_size,
        "prefix_tokens": prefix_tokens(encoder.config),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "model_class": type(encoder).__name__,
        "tasks": tasks if full else [],
        "prompt": prompt,
        "code": _made_by(folder),
        "license": license,
    }
    return facts, {"tensors": tensors, "words": words}


def probe_picture():
    """The picture that exports are compared on: shades, edges and noise, 96 x 64, the same on every machine."""
    import numpy as np
    from PIL import Image

    rows, cols = np.mgrid[0:64, 0:96]
    pixels = np.stack([cols * 255 // 95, rows * 255 // 63, (rows // 8 + cols // 8) % 2 * 200], axis=-1)
    noise = np.random.default_rng(0).integers(0, 40, size=pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def add_clip_settings(path: Path, config: UnitVisionConfig, images: UnitImageProcessor) -> int:
    """Let transformers' own `CLIPImageProcessor` read the file of our image processor: squares at x1, whole patches.
    `AutoImageProcessor` takes that one where remote code is not trusted, and ours, by `auto_map`, where it is.

    Returns:
        The side of the square in pixels.
    """
    side = max(config.patch_size, images.base_size // config.patch_size * config.patch_size)
    squares = {"do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": 3}
    squares |= {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
    }
    settings = json.loads(path.read_text(encoding="utf-8")) | squares | {"rescale_factor": 1 / 255}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return side


def _copy_papers(source: Path, folder: Path, evaluation: str | Path | None, full: bool) -> None:
    """Recipe, log, curves, evaluation and its plots, list of data, from beside the weights; paths of this machine and
    settings of the Hub stay behind. Figures on sets of the Hub go to `.eval_results/` too, where the Hub looks."""
    for name in (cards.LOG, cards.CURVE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    try:
        recipe = cards._json(source / cards.RECIPE)
    except ValueError as error:
        raise PublishError(f"{source}: {error}") from error
    if recipe is not None:
        recipe = public_recipe(recipe)
        _write_json(folder / cards.RECIPE, recipe)
        _write_json(folder / cards.DATA, cards.data_list(recipe))
    given = Path(evaluation) if evaluation is not None else source / "evaluation"
    if evaluation is not None and not (given / RESULTS).is_file():
        raise PublishError(f"{given}: no evaluation there (no {RESULTS}); unit evaluate writes one")
    if not (given / RESULTS).is_file():
        return
    there = folder / "evaluation"
    try:
        results = _without_paths(_without_home(load_results(given)))
        cards.results_tables(results)
        listed = eval_result_files(results, full)
        there.mkdir()
        plot_scales(results, there / cards.SCALES, full)
        plot_retention(results, there / cards.RETENTION, full)
        plots = {suite: f"{suite}.png" for suite in SUITE_TITLES if plot_suite(results, suite, there / f"{suite}.png")}
        (there / REPORT).write_text(report_text(results | {"plots": plots}), encoding="utf-8")
    except ValueError as error:
        raise PublishError(first_line(error)) from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise PublishError(f"{given / RESULTS}: not what unit evaluate writes: {error!r}") from error
    _write_json(there / RESULTS, results)
    for name, text in listed.items():
        (folder / ".eval_results").mkdir(exist_ok=True)
        (folder / ".eval_results" / name).write_text(text, encoding="utf-8")


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe without its settings of the Hub and where things lay on the machine that trained."""
    training = {key: value for key, value in (recipe.get("training") or {}).items() if not key.startswith("hub_")}
    return _without_home(recipe | {"training": training} if training else recipe)


def _draw_picture(encoder: Any, image_processor: UnitImageProcessor, path: Path) -> None:
    with suppress(ImportError):  # the samples are not installed: a card without a picture
        cards.draw_picture(encoder, image_processor, path)


def _forget_paths(path: Path) -> None:
    """Where the parts lay on this machine (`_name_or_path`) is nobody else's business."""
    config = json.loads(path.read_text(encoding="utf-8"))

    def visit(part):
        if isinstance(part, dict):
            name = part.get("_name_or_path")
            if isinstance(name, str) and (os.path.isabs(name) or Path(name).exists()):
                part["_name_or_path"] = ""
            for value in part.values():
                visit(value)

    visit(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_home(found: Any) -> Any:
    """Paths of the machine that trained: the home folder as ~, of any other absolute path its last name alone."""
    home = str(Path.home())
    if isinstance(found, dict):
        return {key: _without_home(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_without_home(value) for value in found]
    if isinstance(found, str) and len(home) > 1 and (found == home or found.startswith(home + os.sep)):
        return "~" + found[len(home) :]
    if isinstance(found, str) and os.path.isabs(found) and len(Path(found).parts) > 2 and not re.search(r"\s", found):
        return f".../{Path(found).name}"
    return found


def _without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """Results of `unit evaluate` without the absolute paths that stand inside their command and their notes."""

    def plain(text: str) -> str:
        return re.sub(r"(?<![\w~.:/])/(?:[^\s/'\"]+/)+([^\s/'\",;:)]*)", r".../\1", text)

    notes = [note | {"text": plain(note["text"])} for note in results["notes"]]
    return results | {"command": plain(results["command"]), "notes": notes}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _made_by(folder: Path) -> str:
    """The code that trained, if the recipe recorded it, and the code that published: never one for the other."""
    recipe = cards._json(folder / cards.RECIPE) or {}
    now, then = code_version(), recipe.get("code")
    if then == now:
        return f"trained and published by {now}"
    return f"{f'trained by {then}' if then else 'which one trained was not recorded'}; published by {now}"


# -- the check ----------------------------------------------------------------------------------------------------


def check_export(folder: Path, facts: dict[str, Any], expected: dict[str, Any], work: Path) -> None:
    """Load an exported folder in a process where our packages cannot be imported, in an empty working folder, without
    network or token, and compare what it gives with what the model gave in memory.

    Raises:
        ExportDiffers: it does not load there, or gives something else; the message says what.
    """
    work.mkdir(parents=True)
    probe_picture().save(work / "picture.png")
    job = {"folder": str(folder), "picture": str(work / "picture.png")}
    job |= {"kind": facts["kind"], "remote": facts["remote"], "clip": bool(facts["clip"])}
    found, words = run_clean_process(job, work)
    differences = list(compare(expected["tensors"], expected["words"], found, words))
    if differences:
        raise ExportDiffers(f"the export does not give what the model in memory gives: {'; '.join(differences)}")


def run_clean_process(job: dict[str, Any], work: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run `clean_process.py` on a job in the folder `work`; what it measured, tensors and words.

    Raises:
        ExportDiffers: it failed.
    """
    from safetensors.torch import load_file

    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    job = job | {"out": str(work), "threads": torch.get_num_threads()}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in tokens}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home"), "HF_MODULES_CACHE": str(work / "modules")}
    environment.pop("HF_HUB_CACHE", None)
    process = subprocess.run(
        [sys.executable, "-I", str(Path(clean_process.__file__).resolve()), str(work / "job.json")],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0 or not (work / "measured.json").is_file():
        lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit status {process.returncode}"
        raise ExportDiffers(f"the export does not load in a clean process: {last}")
    words = json.loads((work / "measured.json").read_text(encoding="utf-8"))
    return load_file(work / "measured.safetensors"), words


def compare(
    tensors: dict[str, torch.Tensor], words: dict[str, Any], found: dict[str, torch.Tensor], said: dict[str, Any]
) -> Iterator[str]:
    """What differs between the model in memory (`tensors`, `words`) and the export (`found`, `said`), in words."""
    yield from said["problems"]
    weights, others = words["weights"], said["weights"]
    wrong = sorted(name for name in weights.keys() | others.keys() if weights.get(name) != others.get(name))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield f"{len(wrong)} of {len(weights)} weights ({', '.join(wrong[:3])}{more})"
    for name in sorted(tensors.keys() | found.keys()):
        expected, got = tensors.get(name), found.get(name)
        if expected is None or got is None:
            yield f"{name}: only in {'the export' if expected is None else 'memory'}"
        elif expected.shape != got.shape or expected.dtype != got.dtype:
            yield f"{name}: {got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        elif not torch.equal(expected, got):
            gap = (expected.double() - got.double()).abs()
            yield f"{name}: {int((gap != 0).sum())} of {gap.numel()} values, by up to {gap.max():.3g}"
    if words.get("text") != said.get("text"):
        yield f"text: {said.get('text')!r} instead of {words.get('text')!r}"


# -- the Hub ------------------------------------------------------------------------------------------------------


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _token(api: Any) -> str | None:
    from huggingface_hub import get_token

    return api.token if isinstance(api.token, str) else get_token()


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        PublishError: `repo_id` is not `OWNER/NAME` as the Hub takes it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name for a repository: {first_line(error)}") from error
    if "/" not in repo_id:
        raise PublishError(f"{repo_id!r}: name the owner too, as in OWNER/{repo_id}")


def check_access(
    api: Any, repo_id: str, private: bool = False, create_pr: bool = False, repo_type: str = "model"
) -> None:
    """Before the long work: a token, one that the Hub knows and that may write, a repository as private as asked for.

    Raises:
        PublishError: one of them lacks.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if _token(api) is None:
        raise PublishError(NO_TOKEN)
    who = api.whoami()
    role = (who.get("auth") or {}).get("accessToken") or {}
    if role.get("role") == "read":
        raise PublishError("the token may only read: make one with the right to write")
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        if create_pr:
            raise PublishError(
                f"{repo_id}: does not exist yet, so there is nothing to open a pull request on"
            ) from None
        owner, owners = repo_id.split("/")[0], [who.get("name"), *(each.get("name") for each in who.get("orgs") or [])]
        if owner not in owners:
            raise PublishError(f"the token has no right to make {repo_id}: it may in {', '.join(owners)}") from None
        return
    if not create_pr:
        api.auth_check(repo_id, repo_type=repo_type, write=True)
    if private and not info.private:
        raise PublishError(f"{repo_id}: exists and is public; --private is for a new repository")


def upload(
    folder: Path,
    repo_id: str,
    api: Any,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    repo_type: str = "model",
    own_files: re.Pattern[str] = OWN_FILES,
    new_repository: dict[str, Any] | None = None,
    overwrite_card: bool = False,
    replace: bool = False,
) -> Published:
    """Bring a repository to what a folder holds in one commit: what differs is added, what an earlier push of ours
    left is deleted, everything else in it stays. The commit is refused if the branch moved meanwhile.

    Args:
        repo_type: "model", "dataset" or "space". own_files: which paths an earlier push may have left.
        new_repository: more arguments of `HfApi.create_repo`, for a repository that does not exist.
        overwrite_card, replace: as of [`publish`].

    Raises:
        PublishError: the repository holds a model of another kind, and `replace` is not said.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    kind = {"repo_type": repo_type}
    try:
        head = api.repo_info(repo_id, revision=revision, **kind).sha
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
        head = api.repo_info(repo_id, revision=revision, **kind).sha
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None, exist_ok=True, **kind, **(new_repository or {}))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
        head = api.repo_info(repo_id, revision=revision, **kind).sha
    there = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=head, **kind):
        if hasattr(entry, "blob_id"):  # folders have none
            there[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    changed = [name for name in names if there.get(name) not in _hashes(folder / name)]
    kept = []
    if repo_type == "model":
        was, will = content_kind(there), content_kind(names)
        if was not in (None, will) and not replace:
            raise PublishError(
                f"{repo_id}: holds {was}, which this push would replace by {will}: name another repository, or say "
                "--replace"
            )
        if was not in (None, will):
            own_files = re.compile(f"{own_files.pattern}|{OTHER_KINDS.pattern}")
    if README in changed and README in there and not overwrite_card:
        card = Path(api.hf_hub_download(repo_id, README, revision=head, **kind)).read_text(encoding="utf-8")
        if not cards.is_untouched(card):
            kept.append(README)
            ours = (folder / README).read_text(encoding="utf-8")
            needed = cards.with_app_settings(card, ours) if repo_type == "space" else card
            if needed == card:
                changed.remove(README)
            else:
                (folder / README).write_text(needed, encoding="utf-8")
    stale = sorted(name for name in there if name not in names and own_files.match(name))
    if not changed and not stale:
        return Published(repo_id, commit=head, kept=kept)
    operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in changed]
    operations += [CommitOperationDelete(name) for name in stale]
    done = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Push by unit-vision: {len(changed)} file{'s' if len(changed) != 1 else ''}",
        parent_commit=head,
        revision=revision,
        create_pr=create_pr,
        **kind,
    )
    return Published(repo_id, commit=done.oid, url=done.pr_url or done.commit_url, uploaded=changed + stale, kept=kept)


def content_kind(names: Collection[str]) -> str | None:
    """What a repository of these files holds; `None` where it is no model yet."""
    if "adapter_config.json" in names:
        return "an adapter"
    if CONFIG not in names:
        return None
    return "a full model" if "processor_config.json" in names else "an encoder alone"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashes(path: Path) -> tuple[str, str]:
    """What the Hub may know a file by: SHA-256 of one in LFS, git's own hash of any other."""
    whole, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            whole.update(piece)
            blob.update(piece)
    return whole.hexdigest(), blob.hexdigest()


def refuse_secrets(folder: Path, token: str | None) -> None:
    """
    Raises:
        PublishError: a file other than weights and shards holds the token, or something that looks like one.
    """
    for path in _files(folder):
        if path.suffix in (".safetensors", ".parquet"):  # the texts of a data set are looked at row by row
            continue
        content = path.read_bytes()
        if (token and token.encode() in content) or TOKEN.search(content):
            name = path.relative_to(folder).as_posix()
            raise PublishError(f"{name} holds what looks like a token of the Hub; take it out first")


@contextmanager
def explained(repo_id: str, api: Any) -> Iterator[None]:
    """The Hub's errors as one line that says what to do; never the token."""
    try:
        yield
    except PublishError:
        raise
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        raise PublishError(_masked(_reason(error, repo_id, api), api)) from None


def _http_error() -> type[Exception]:
    """The base of what goes wrong on the way to the Hub, whichever HTTP library huggingface_hub has."""
    from huggingface_hub.errors import HTTPError

    return HTTPError


def _reason(error: BaseException, repo_id: str, api: Any) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    chain = [error]  # an upload that failed names its file; why it failed is the cause
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for each in chain:
        if isinstance(each, LocalTokenNotFoundError):
            return NO_TOKEN
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: a push needs the Hub (--dry-run does without)"
        if isinstance(each, HfHubHTTPError):
            status, said = each.response.status_code, each.server_message or first_line(each)
            reason = REASONS.get(status, "the Hub refused ({status})").format(repo_id=repo_id, status=status)
            return f"{reason}{f' [{said}]' if said else ''}"
        if isinstance(each, (_http_error(), ConnectionError, TimeoutError)):
            broken = f"no connection to {api.endpoint}: {first_line(each)}"
            return f"{broken}; the branch holds no half of this push, run it again"
    return f"{repo_id}: {first_line(error)}"


def _masked(text: str, api: Any) -> str:
    token = _token(api)
    text = text.replace(token, "***") if token else text
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)  # what is signed lets anybody in for a while
    return " ".join(re.sub(r"\bhf_[A-Za-z0-9]{6,}", "***", text).split())


# -- from a recipe ------------------------------------------------------------------------------------------------


def take_hub_settings(training: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a recipe's `training` into what the Trainer gets and what the push at the end takes: transformers' own
    uploads of every checkpoint, unchecked and without code, do not run beside it.

    Raises:
        PublishError: a push without `hub_model_id`, a name that is none, a token in the recipe, a setting of
            transformers' uploads that has no meaning here.
    """
    hub = {key: training[key] for key in HUB_SETTINGS if key in training}
    rest = {key: value for key, value in training.items() if key not in HUB_SETTINGS}
    if rest.get("hub_token"):
        raise PublishError("training.hub_token: a recipe is published with its model; set HF_TOKEN instead")
    other = [key for key in rest if key.startswith("hub_") and rest[key] is not None]
    if hub.get("push_to_hub") and other:
        raise PublishError(
            f"training.{other[0]} has no meaning here: the model is pushed once, at the end; known are "
            f"{', '.join(HUB_SETTINGS)}"
        )
    if hub.get("push_to_hub"):
        if not hub.get("hub_model_id"):
            raise PublishError("training.push_to_hub needs training.hub_model_id, OWNER/NAME")
        check_repo_id(hub["hub_model_id"])
    return rest, hub


def check_destination(hub: dict[str, Any], api: Any = None) -> None:
    """Before a run that is to be pushed at its end: what [`check_access`] asks.

    Raises:
        PublishError: the push would be refused.
    """
    api = api or _api()
    with explained(hub["hub_model_id"], api):
        check_access(api, hub["hub_model_id"], bool(hub.get("hub_private_repo")))


def push_run(folder: Path, hub: dict[str, Any]) -> Published:
    """The push at the end of a run; the model is saved already, whatever becomes of it.

    Raises:
        PublishError: as [`publish`], and how to try again.
    """
    repo_id = hub["hub_model_id"]
    try:
        done = publish(
            folder,
            repo_id,
            private=bool(hub.get("hub_private_repo")),
            revision=hub.get("hub_revision"),
            say=lambda line: print(line, flush=True),
        )
    except PublishError as error:
        raise PublishError(
            f"The model is in {folder}, but was not pushed: {error}; to try again: unit push {folder} {repo_id}"
        ) from error
    print(f"Pushed to {repo_id}: {done.url or 'it held all of this already'}", flush=True)
    return done
