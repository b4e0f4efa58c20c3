"""Random generators of a rank, which dropout draws from."""

import logging

import numpy as np
import torch
from accelerate import Accelerator

from charrnn.config import RunConfig
from train.checkpoint.format import Checkpoint, Tensors

logger = logging.getLogger(__name__)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators with a value unique to (step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def rank_rng(device: torch.device) -> Tensors:
    """This rank's generator states."""
    states: Tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rank_rng(accelerator: Accelerator, saved: Checkpoint, config: RunConfig) -> None:
    """Restore this rank's generators. If the number of processes or the device has changed, seed new ones.

    Args:
        accelerator: This rank's.
        saved: The checkpoint.
        config: The run's config, for its seed and whether it uses dropout.
    """
    saved_on, device = ("cuda" if "cuda" in saved.rng[0] else "cpu"), accelerator.device
    changes = []
    if len(saved.rng) != accelerator.num_processes:
        changes.append(f"{len(saved.rng)} process(es) before, {accelerator.num_processes} now")
    if saved_on != device.type:
        changes.append(f"device {saved_on} before, {device.type} now")
    if changes:
        effect = "dropout's random generators are reseeded, all else is restored"
        logger.info("%s: %s", ", ".join(changes), effect if config.model.dropout else "all state is restored")
        seed_rank(config.train.seed, saved.step, accelerator.process_index)
        return
    states = saved.rng[accelerator.process_index]
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
