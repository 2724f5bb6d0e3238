"""The teacher's features: in which precision they are computed, and kept so that each picture is computed once.

`training.teacher_dtype`: the teacher is frozen and its features are targets, so a run in bf16 has it in bfloat16
(`auto`). On 40 pictures the features of unit-tiny's teacher then lie at a cosine distance of 3e-5 from those in
float32 (2e-4 at most for a token) and 0.7% of their mean size away; on a CPU they take 0.29 of the time [measured].

`training.teacher_cache`: a store on disk, filled as the run goes. It pays where pictures come again just as they were:
finite data, and pictures that are not changed at random (`data.augment_pictures: false`). A key is the hash of the
very pixels that the teacher gets, which the collator takes in its worker, so that whatever changes them (row, size,
scale, cropping) is another key, and a picture that never comes again only fills the store. Under a folder named by the
hash of the teacher's weights (as they are when it is first asked: adapters may have it share the student's), its
configuration, its precision and the normalisation of pixels lie

    NAME/T-D/segment-K.bin    records of one size: key (16 bytes), checksum (4), 12 of zeros, T * D features

written by one process each, which holds a lock on it, and read by all. A record that was cut off by `kill -9`, or is
not what was written, is computed again. Features are kept in the precision that they were computed in and come back
bit by bit. Which bits those are may depend on the batch that a picture first came in, as it does without a cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from modeling_unit.architectures_unit import prefix_tokens, run_encoder, run_encoder_packed

HEADER = 32  # bytes of a record before its features
KEY = 16  # bytes
SPARE = 1 << 30  # bytes that stay free on the disk [ours]
FOLDER = "teacher-cache"  # of a run


def picture_key(pixels: np.ndarray) -> np.ndarray:
    """Hash of a picture's pixels and their shape, `(16,)` uint8."""
    digest = hashlib.blake2b(repr((pixels.shape, str(pixels.dtype))).encode(), digest_size=KEY)
    digest.update(np.ascontiguousarray(pixels))
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def teacher_name(teacher: nn.Module, processor: Any = None) -> str:
    """Hash of what the features of given pixels depend on: weights, configuration, precision, normalisation."""
    config = {key: value for key, value in teacher.config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "auto_map", "architectures", "dtype", "torch_dtype"):
        config.pop(key, None)
    facts = {"class": type(teacher).__name__, "config": config}
    if processor is not None:
        names = ("do_normalize", "image_mean", "image_std")
        facts |= {name: getattr(processor, name, None) for name in names}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def teacher_dtype(settings: Any) -> torch.dtype:
    """What the teacher of a run computes in, and is held in."""
    wanted = settings.teacher_dtype
    return torch.bfloat16 if wanted == "bfloat16" or (wanted == "auto" and settings.bf16) else torch.float32


class FeatureStore:
    """Features of one shape on disk, by the keys of their pictures.

    Args:
        folder: made where it is missing; may be in use by other processes.
        tokens, width: `(T, D)`. dtype: float32 or bfloat16.
        limit: bytes that `whole` may hold, a folder with this and other stores; by default this one.
    """

    def __init__(
        self,
        folder: str | Path,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        limit: float,
        whole: str | Path | None = None,
    ):
        self.folder, self.shape, self.dtype, self.limit = Path(folder), (tokens, width), dtype, limit
        self.payload = tokens * width * dtype.itemsize
        self.record = HEADER + self.payload
        self.places: dict[bytes, tuple[int, int]] = {}  # key -> descriptor, offset
        self._files: dict[Path, list[int]] = {}  # path -> descriptor, bytes that are known
        self._own: tuple[int, int] | None = None  # descriptor, bytes written
        self._own_path, self._used = self.folder, 0
        self.full = ""  # why nothing more is written
        self._whole = Path(whole or folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self.places)

    def refresh(self) -> None:
        """Learn what other processes have written."""
        for path in sorted(self.folder.glob("segment-*.bin")):
            if path not in self._files:
                self._files[path] = [os.open(path, os.O_RDONLY), 0]
            descriptor, known = self._files[path]
            whole = os.fstat(descriptor).st_size // self.record * self.record
            for offset in range(known, whole, self.record):
                key = os.pread(descriptor, KEY, offset)
                self.places.setdefault(key, (descriptor, offset))
            self._files[path][1] = max(known, whole)

    def get(self, key: bytes) -> torch.Tensor | None:
        """`(T, D)`, `None` where it is not there or damaged."""
        if key not in self.places:
            return None
        descriptor, offset = self.places[key]
        record = bytearray(self.record)
        read = os.preadv(descriptor, [record], offset)
        payload = memoryview(record)[HEADER:]
        if read != self.record or zlib.crc32(payload, zlib.crc32(key)) != int.from_bytes(record[KEY : KEY + 4], "big"):
            del self.places[key]
            return None
        return torch.frombuffer(record, dtype=self.dtype, offset=HEADER).view(self.shape)

    def put(self, key: bytes, features: torch.Tensor) -> bool:
        """Keep `(T, D)` on the CPU; whether it was kept."""
        if key in self.places or self.full:
            return False
        descriptor, written = self._own or self._begin()
        payload = features.contiguous().view(torch.uint8).numpy().tobytes()
        checksum = zlib.crc32(payload, zlib.crc32(key)).to_bytes(4, "big")
        try:
            if len(self) % 64 == 0:  # others write too, here and elsewhere
                self._used = self._bytes()
                disk = os.statvfs(self.folder)
                if disk.f_bavail * disk.f_frsize < SPARE + self.record:
                    raise OSError(errno.ENOSPC, "the disk has less than a gigabyte left")
            if self._used + self.record > self.limit:
                self.full = f"it holds the {self.limit / 1e9:.3g} GB of training.teacher_cache_gigabytes"
                return False
            record = key + checksum + bytes(HEADER - KEY - 4) + payload
            if os.pwrite(descriptor, record, written) != self.record:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.full = error.strerror
            return False
        self.places[key] = (descriptor, written)
        self._own = (descriptor, written + self.record)
        self._used += self.record
        self._files[self._own_path][1] = written + self.record
        return True

    def _begin(self) -> tuple[int, int]:
        """Take the first segment that no other process writes, and go on behind its last whole record."""
        number = 0
        while True:
            path = self.folder / f"segment-{number}.bin"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                os.close(descriptor)
                number += 1
        written = os.fstat(descriptor).st_size // self.record * self.record
        self._own, self._own_path = (descriptor, written), path
        self.refresh()
        self._used = self._bytes()
        return descriptor, written

    def _bytes(self) -> int:
        return sum(each.stat().st_size for each in self._whole.rglob("segment-*.bin"))

    def close(self) -> None:
        """Let go of the files, and of the lock."""
        for descriptor in {each for each, _ in self._files.values()} | ({self._own[0]} if self._own else set()):
            os.close(descriptor)
        self._files, self._own, self.places = {}, None, {}


class TeacherFeatures(TrainerCallback):
    """A frozen teacher as a trainer asks it: `(pixels, keys) -> features`, in its precision, kept where a run wants
    it.

    Args:
        teacher: `requires_grad_(False).eval()`, on its device; cast here.
        settings: `teacher_dtype`, `teacher_cache`, `bf16`, ... of the run.
        groups: of the training data, to know whether their pictures come again as they were.
        processor: normalises raw pixels.
    """

    def __init__(self, teacher: nn.Module, settings: Any, groups: Any = None, processor: Any = None):
        if teacher.dtype != teacher_dtype(settings):
            teacher.to(teacher_dtype(settings))
        self.teacher, self.settings, self.processor = teacher, settings, processor
        self.root: Path | None = None  # None: nothing is kept
        self.folder: Path | None = None  # of this teacher, from the first picture on
        self.stores: dict[int, FeatureStore] = {}  # by the number of tokens
        self.computed = self.read = 0  # pictures
        self.computing = self.reading = self.training = 0.0  # seconds
        self._steps, self._begun, self._told_full = 0, 0.0, False
        if settings.teacher_cache:
            self._open(groups or [])

    def _open(self, groups: Any) -> None:
        natural = [each.collator for each in groups if each.arguments.kind == "natural"]
        changed = [each for each in natural if getattr(each, "augment_pictures", True)]
        if natural and (changed or all(getattr(each, "packed", False) for each in natural)):
            why = (
                "pictures are changed at random, so that none comes twice (data.augment_pictures: false leaves them "
                "as they are)"
                if changed
                else "pictures come in packs"
            )
            self._say(f"teacher_cache: not used: {why}.")
            return
        given = self.settings.teacher_cache
        self.root = Path(self.settings.output_dir) / FOLDER if given is True else Path(given)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"training.teacher_cache: {self.root} cannot be written to: {error.strerror}.") from error

    def _say(self, line: str) -> None:
        if self.settings.process_index == 0:
            print(line, flush=True)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, 3, H, W)` -> `(B, S + M, D)` in the teacher's precision. keys: `(B, 16)` uint8, see [`picture_key`];
        taken of `pixel_values` where the collator gave none."""
        if self.root is None:
            return self._of(run_encoder, pixel_values)
        if self.folder is None:
            self.folder = self.root / teacher_name(self.teacher, self.processor)
        begun = time.monotonic()
        if keys is None:
            keys = np.stack([picture_key(each) for each in pixel_values.cpu().numpy()])
        else:
            keys = keys.cpu().numpy()
        keys = [each.tobytes() for each in keys]
        store = self._store(*pixel_values.shape[-2:])
        if any(key not in store.places for key in keys):
            store.refresh()
        kept = [store.get(key) for key in keys]
        if all(each is not None for each in kept):
            features = torch.stack(kept).to(pixel_values.device)
            self.read += len(keys)
            self.reading += time.monotonic() - begun
            return features
        # the whole batch, also where some are known: features depend on the batch in their last bits
        features = self._of(run_encoder, pixel_values)
        fresh = features.cpu()
        self.computing += time.monotonic() - begun
        self.computed += len(keys)
        for place, key in enumerate(keys):
            if kept[place] is None:
                store.put(key, fresh[place])
            else:
                features[place] = kept[place].to(features.device)
        if store.full and not self._told_full:
            self._told_full = True
            self._say(f"teacher_cache: nothing more is kept: {store.full}.")
        return features

    @torch.no_grad()
    def packed(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """A pack `(sum N_i, 3 * P * P)` of grids `(B, 2)` -> `(1, sum (S + N_i), D)`; not kept."""
        return self._of(run_encoder_packed, pixel_values, grids)[None]

    def _of(self, run: Callable[..., Any], pixel_values: torch.Tensor, *args) -> torch.Tensor:
        """The teacher's output, in its own precision also where the student's is autocast, as in an evaluation."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return run(self.teacher, pixel_values, *args).last_hidden_state.to(teacher_dtype(self.settings))

    def _store(self, height: int, width: int) -> FeatureStore:
        """Of pictures of a size; those of one number of tokens share it, for the size is in their keys."""
        config = self.teacher.config
        tokens = prefix_tokens(config) + (height // config.patch_size) * (width // config.patch_size)
        if tokens not in self.stores:
            shape, dtype = (tokens, config.hidden_size), teacher_dtype(self.settings)
            folder = self.folder / f"{tokens}-{config.hidden_size}"
            limit = 1e9 * self.settings.teacher_cache_gigabytes
            self.stores[tokens] = FeatureStore(folder, *shape, dtype, limit, self.root)
        return self.stores[tokens]

    # -- what it saved, at the end of the run -------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun, self._steps = time.monotonic(), state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        if self.folder is not None and self.computed + self.read:
            self._say(self.summary(state.global_step - self._steps, time.monotonic() - self._begun))

    def summary(self, steps: int, seconds: float) -> str:
        """What was read and computed, the bytes of a picture, and the steps in a second with and without."""
        each = [store.record for store in self.stores.values()]
        computed = self.computing / self.computed if self.computed else 0.0
        read = self.reading / self.read if self.read else 0.0
        told = (
            f"teacher_cache: {self.read:,} pictures read ({1e3 * read:.2f} ms each), {self.computed:,} computed "
            f"({1e3 * computed:.2f} ms each), {sum(len(store) for store in self.stores.values()):,} kept, "
            f"{max(each):,} bytes a picture"
        )
        if self.read and self.computed and steps and seconds > 0:
            without = seconds + self.read * (computed - read)
            told += f"; {steps / seconds:.3g} steps/s, without about {steps / max(without, 1e-9):.3g}"
        return told + "."
