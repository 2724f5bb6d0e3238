"""The processes of test_devices.py: runs recipes as `accelerate launch` would have it run them, over gloo.

Its argument is a JSON file: a list of `[processes, port, jobs]`, done one after another; a job is `{"recipe": path,
"overrides": [...], "fsdp": bool, "copy": [from, to], "error": path}`. A checkpoint is copied before the run, the line
of a run that is refused goes to `error`. Processes are forked from this one, so that all is imported once.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch

from training.recipe import main

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def run(jobs: list[dict], rank: int) -> None:
    """The part of one process in the jobs."""
    for job in jobs:
        for key in FSDP:
            os.environ.pop(key, None)
        if job["fsdp"]:
            os.environ.update(FSDP | job.get("environment", {}))
        if "copy" in job and rank == 0:  # the others wait for what rank 0 finds
            shutil.copytree(*job["copy"])
        try:
            main(job["recipe"], job["overrides"])
        except ValueError as error:
            if "error" not in job:
                raise
            if rank == 0:
                Path(job["error"]).write_text(str(error))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def forked(processes: int, port: int, jobs: list[dict]) -> bool:
    """Whether all processes have come to their end."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if processes > 1:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        try:
            run(jobs, rank)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    for _ in range(processes):
        child, status = os.wait()
        children.remove(child)
        if status:
            for left in children:
                os.kill(left, 9)
            return False
    return True


torch.set_num_threads(1)
for stage in json.loads(Path(sys.argv[1]).read_text()):
    if not forked(*stage):
        sys.exit(1)
