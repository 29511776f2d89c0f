"""Whole commands on a CUDA device in the host's memory: `torchrun ... -m tests.fake_cuda.whole FILE`.

FILE holds a JSON list of calls, each a list of a module and its arguments. All ranks run them, one after the other.
For each, rank 0 prints a line of JSON: the exit code, and where the host waited for the device.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cuda"  # before DeepSpeed asks for a device, which is when it is imported

# These packages look at the device when they are imported.
import deepspeed  # noqa: F401
import diffusers.models.unets.unet_2d_condition  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
import xformers.ops  # noqa: F401

from tests.fake_cuda import in_host_memory
from tests.fake_cuda.device import WAITS
from tests.trainer.in_turn import in_turn


def main(file: Path) -> int:
    in_host_memory.pretend()
    for module, *arguments in json.loads(file.read_text()):
        WAITS.clear()
        code = in_turn([arguments], module)
        if os.environ["RANK"] == "0":
            print(json.dumps({"code": code, "waits": dict(WAITS)}), flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
