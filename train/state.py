"""A trainer's state as a checkpoint, and back. What ranks hold apart is gathered: a checkpoint is of the whole run."""

from typing import TYPE_CHECKING

from train.checkpoint.format import Checkpoint, optimizer_tensors, restore_optimizer
from train.checkpoint.resume import identity_fields
from train.checkpoint.rng import rank_rng, restore_rank_rng
from train.distributed.setup import device_name
from train.progress import Progress

if TYPE_CHECKING:
    from train.trainer import Trainer


def capture(trainer: "Trainer", *, whole: bool) -> Checkpoint:
    """The trainer's present state; every rank must call this. whole: with all that resuming needs, not inference alone.

    The tensors are the trainer's own, not copies; those of the carried state are gathered, each (L, B, H).
    """
    scaler = trainer.accelerator.scaler
    record = {
        **vars(trainer.progress),
        "elapsed_s": trainer.now(),
        "num_processes": trainer.accelerator.num_processes,
        "loss_scale": scaler.state_dict() if scaler else None,
        "corpus": identity_fields(trainer.corpus),
        "metrics": _file_metrics(trainer),
    }
    weights = trainer.model.state_dict()
    if not whole:
        return Checkpoint(trainer.config, trainer.vocab, weights, record)
    gather = trainer.accelerator.gather
    return Checkpoint(
        trainer.config,
        trainer.vocab,
        weights,
        record,
        optimizer=optimizer_tensors(trainer.model, trainer.optimizer.optimizer),
        carried=tuple(gather(p.transpose(0, 1).contiguous()).transpose(0, 1) for p in trainer.carried),
        rng=tuple(trainer.collectives.all_gather(rank_rng(trainer.device))),
    )


def restore(trainer: "Trainer", saved: Checkpoint) -> None:
    """Puts back what is not in the weights: optimizer, carried state, random generators, clock, best."""
    restore_optimizer(trainer.model, trainer.optimizer.optimizer, saved.optimizer)
    # (L, B, H) -> this rank's (L, B / world, H)
    trainer.carried = tuple(part[:, trainer.rows].contiguous().to(trainer.device) for part in saved.carried)
    restore_rank_rng(trainer.accelerator, saved, trainer.config)
    trainer.progress = progress_of(saved)
    if trainer.accelerator.scaler and saved.trainer["loss_scale"]:
        trainer.accelerator.scaler.load_state_dict(saved.trainer["loss_scale"])
    trainer.metrics = {k: v for k, v in saved.trainer["metrics"].items() if "/" in k}


def progress_of(saved: Checkpoint) -> Progress:
    """How far the run had come."""
    return Progress(**{name: saved.trainer[name] for name in vars(Progress())})


def _file_metrics(trainer: "Trainer") -> dict[str, object]:
    """What a model file says of its own making."""
    return {
        "step": trainer.progress.step,
        "chars": trainer.chars(),
        "time_s": round(trainer.now(), 3),
        "parameters": trainer.model.num_parameters(),
        "processes": trainer.accelerator.num_processes,
        "hardware": device_name(trainer.device),
        "precision": trainer.accelerator.mixed_precision,
        **trainer.metrics,
    }
