"""train/main.py for several ranks on one GPU, which NCCL refuses: gloo carries the tensors, all use the same device."""

import functools
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP without device_ids
    if device := os.environ.get("TWO_RANKS_DEVICE"):
        os.environ["ACCELERATE_TORCH_DEVICE"] = device

    from train.distributed import setup
    from train.main import main

    setup.InitProcessGroupKwargs = functools.partial(setup.InitProcessGroupKwargs, backend="gloo")
    main()
