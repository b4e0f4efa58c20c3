"""train/main.py for several ranks on one GPU, which NCCL refuses: gloo carries the tensors, all use the same device.

`torchrun --nproc-per-node 2 benchmarks/gpu/two_ranks.py DEVICE OPTIONS OF train/main.py`
"""

import functools
import os
import sys

if __name__ == "__main__":
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP without device_ids
    if (device := sys.argv.pop(1)) != "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = device

    from train.distributed import setup
    from train.main import main

    setup.InitProcessGroupKwargs = functools.partial(setup.InitProcessGroupKwargs, backend="gloo")
    main()
