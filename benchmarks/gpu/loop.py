"""Checks of the training loop: graph against eager, resuming, divergence, memory, DDP."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import free_port
from benchmarks.gpu.results import Value
from benchmarks.gpu.setup import Setup, largest_difference, train
from benchmarks.quality.dynamic import DynamicOptions, dynamic_loss
from charrnn.config import ModelConfig, RunConfig
from charrnn.errors import TrainingError
from charrnn.model.rnn import CharRNN, NextCharLoss
from train.distributed.setup import compress_gradients
from train.loop.cuda_graph import WARMUP_STEPS
from train.loop.dataloader import IdSource
from train.loop.errors import memory_explained


def graph(setup: Setup) -> Value:
    """The losses of 40 steps replayed as a CUDA graph against those of eager steps, in each precision.

    On a CPU the step runs over the same static buffers, without a capture.
    """
    found: Value = {}
    for precision in setup.precisions:
        for rnn, accumulation in (("LSTM", 1), ("GRU", 2)):
            config = setup.config(
                model__rnn=rnn,
                model__layer_norm=rnn == "LSTM",
                model__dropout=0.2,
                model__dropout_mask="window",
                train__accumulation_steps=accumulation,
                train__mixed_precision=precision,
            )
            eager, replayed = (setup.losses(config, setup.size(40, 8), graph=mode) for mode in (False, True))
            first, all_ = largest_difference(eager[:5], replayed[:5]), largest_difference(eager, replayed)
            found[f"{precision}, {rnn}"] = {"first 5": first, "all": all_}
    return {"ok": all(v["first 5"] < 1e-4 and v["all"] < 5e-3 for v in found.values()), **found}


def failed_capture(setup: Setup) -> Value:
    """The losses of 20 steps where the capture fails, after which all are eager, against those of eager steps.

    On a CPU there is no capture that could fail.
    """
    config = setup.config(model__dropout=0.3, train__mixed_precision=setup.precisions[-1], train__noise_scale_every=0)
    forwards, steps = 0, setup.size(20, 8)

    def read_loss(_module: Any, _inputs: Any, outputs: tuple[Tensor, Any]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == WARMUP_STEPS + 1:
            outputs[0].item()  # no capture allows it

    failing = setup.trainer(config, graph=True)
    failing.update.loss_module.register_forward_hook(read_loss)
    difference = largest_difference(train(failing, steps), setup.losses(config, steps))
    eager = forwards == steps + setup.on_gpu
    return {"ok": eager and difference < 1e-3, "eager": eager, "largest difference": difference}


def resuming(setup: Setup) -> Value:
    """Weights after 40 steps: two equal runs, and one with a checkpoint after 20. The largest differences."""
    kinds: dict[str, dict[str, Any]] = {
        "no dropout": {},
        "window mask, layer norm": {
            "model__dropout": 0.3,
            "model__dropout_mask": "window",
            "model__layer_norm": True,
        },
        "character mask": {"model__dropout": 0.3},
        "replayed": {"model__dropout": 0.3, "model__layer_norm": True},
    }
    found: Value = {}
    half = setup.size(20, 4)
    for precision in setup.precisions if setup.on_gpu else ("no",):
        for name, change in kinds.items():
            config = setup.config(model__rnn="LSTM", train__mixed_precision=precision, **change)
            graph = name == "replayed"
            straight = _weights_after(setup, config, graph, 2 * half)
            others = [_weights_after(setup, config, graph, *segments) for segments in ([2 * half], [half, half])]
            found[f"{precision}, {name}"] = [
                max(float((straight[name] - other[name]).abs().max()) for name in straight) for other in others
            ]
    return {"ok": not any(resumed for _, resumed in found.values()), "again, resumed": found}


def _weights_after(setup: Setup, config: RunConfig, graph: bool, *segments: int) -> dict[str, Tensor]:
    """The weights after so many steps, with a checkpoint and a new trainer between segments."""
    run_dir = None
    for steps in segments:
        trainer = setup.trainer(config, graph=graph, run_dir=run_dir)
        train(trainer, steps)
        trainer.save(step=True)
        trainer.checkpoints.wait()
        run_dir = trainer.checkpoints.run_dir
        torch.randn(1000, device=setup.device)  # other uses of the generators must not matter
    return {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}


def divergence(setup: Setup) -> Value:
    """A learning rate far too high ends in the trainer's own error, in fp16 too unless every step is skipped."""
    found, ok = {}, True
    for precision in setup.precisions:
        config = setup.config(
            train__mixed_precision=precision, optim__lr=1e6, optim__grad_clip=0, optim__warmup_steps=0
        )
        trainer = setup.trainer(config)
        try:
            found[precision] = f"no error; last losses {train(trainer, setup.size(80, 40))[-2:]}"
            ok = ok and trainer.accelerator.mixed_precision == "fp16"
        except TrainingError as error:
            found[precision] = str(error)[:100]
    return {"ok": ok, **found}


def dynamic(setup: Setup) -> Value:
    """Dynamic evaluation, which takes gradients in evaluation mode, lowers the loss of a short stream."""
    trainer = setup.trainer(setup.config(model__rnn="LSTM", model__layer_norm=True))
    train(trainer, setup.size(100, 10))
    short = IdSource(trainer.data.corpus.val[: setup.size(4000, 400)], setup.device)
    static, moved = (
        dynamic_loss(trainer.model, short, trainer.data.train, options)["dynamic/stream/loss"]
        for options in (DynamicOptions(lr=0.0, decay=0.0, statistics=20), DynamicOptions(statistics=20))
    )
    return {"ok": moved < static, "static, dynamic": [static, moved]}


def out_of_memory(setup: Setup) -> Value:
    """A batch that does not fit ends in one line with the settings to lower."""
    if not setup.on_gpu:
        return {"skipped": "needs a GPU"}
    config = setup.config(data__batch_size=4096, data__seq_len=200, model__hidden_dim=512, train__max_steps=2)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with memory_explained(config):
            setup.trainer(config).fit()
    except TrainingError as error:
        return {"ok": "ran out of memory" in str(error), "error": str(error)[:200]}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    return {"ok": False, "error": "none"}


def data_parallel(setup: Setup) -> Value:
    """The gradients of DDP over NCCL with one rank are those without, and nearly so when compressed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    dist.init_process_group("nccl" if setup.on_gpu else "gloo", rank=0, world_size=1)
    found: Value = {}
    try:
        for hook in ("none", "bf16"):
            torch.manual_seed(0)
            model = CharRNN(ModelConfig(rnn="LSTM", hidden_dim=setup.size(128, 16), num_layers=2), 65).to(setup.device)
            alone = NextCharLoss(model)
            wrapped = DistributedDataParallel(alone, gradient_as_bucket_view=True)
            compress_gradients(wrapped, hook)
            ids = torch.randint(0, 65, (8, 33), device=setup.device)
            sides = []
            for module in (wrapped, alone):
                module(ids, model.zero_state(8, setup.device))[0].backward()
                sides.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
                model.zero_grad()
            found[hook] = float((sides[0] - sides[1]).norm() / sides[1].norm())
    finally:
        dist.destroy_process_group()
    return {"ok": found["none"] < 1e-5 and found["bf16"] < 1e-2, **found}
