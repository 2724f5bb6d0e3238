"""One process of test_devices.py: runs recipes one after another, as `accelerate launch` would have it run them.

Its argument is a JSON file: a list of `{"overrides": [...], "recipe": path, "fsdp": bool, "error": path}`; the line of
a run that is refused goes to `error`.
"""

import json
import os
import sys
from pathlib import Path

import torch

from training.recipe import main

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}

torch.set_num_threads(1)
for job in json.loads(Path(sys.argv[1]).read_text()):
    for key in FSDP:
        os.environ.pop(key, None)
    if job.get("fsdp"):
        os.environ.update(FSDP | job.get("environment", {}))
    try:
        main(job["recipe"], job["overrides"])
    except ValueError as error:
        if "error" not in job:
            raise
        if os.environ.get("RANK", "0") == "0":
            Path(job["error"]).write_text(str(error))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
