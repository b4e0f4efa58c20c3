"""A run from its config to its model file: processes, corpus, starting point, training, export, summary."""

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from charrnn.config import RunConfig, dump_config
from charrnn.data.corpus import Corpus, prepare
from charrnn.data.download import without_credentials
from charrnn.errors import CheckpointError, ConfigError
from charrnn.io import expand_user, os_errors
from charrnn.log import configure_logging
from train import summary
from train.checkpoint.folders import BEST, remove_unfinished
from train.checkpoint.format import load_for_inference
from train.checkpoint.resume import check_same_start, identity_fields, starting_point
from train.checkpoint.run_lock import exclusive
from train.checkpoint.vocab_transfer import StartingPoint
from train.distributed.collectives import Collectives
from train.distributed.setup import check_processes, check_same_config, make_accelerator, set_threads, shared_fields
from train.distributed.signals import StopSignals, stop_error
from train.distributed.watchdog import Watchdog, connect_store, is_collective_error
from train.export.exporter import export_checkpoint
from train.loop.control import Control
from train.loop.dataloader import num_trained, window_plan
from train.loop.errors import memory_explained
from train.loop.flops import peak_flops
from train.loop.memory import keep_freed_memory
from train.loop.schedule import Progress, Schedule
from train.loop.trainer import Trainer
from train.recipe.size_run import UserSettings, size_run
from train.tracking.console import ConsoleHandler, Display
from train.tracking.metrics_log import MetricsLog
from train.tracking.recorder import Recorder, make_tracker

logger = logging.getLogger(__name__)


def run(config: RunConfig, *, config_name: str, resume: bool, settings: UserSettings | None = None) -> Path | None:
    """Train, export and report.

    Args:
        config: The run's config.
        config_name: Prefix of the run folder's name, unless empty.
        resume: Whether to resume a run that the folder holds.
        settings: What the user set, if the recipe is to choose the rest; None takes `config` as it is.

    Returns:
        The model file on the main process, None on others.

    Raises:
        CharRNNError: For a user error, on all ranks, and after a stop signal. After a peer failure it does not return:
            the watchdog ends the process.
    """
    console = Console(stderr=True)
    accelerator = set_up(config, console)
    collectives = Collectives(accelerator)
    check_config(config, collectives, accelerator, sized=settings is None)
    with watch_peers(config, collectives) as watchdog, contextlib.ExitStack() as stack:
        corpus = collectives.local_main_first(lambda: prepare(config.data))
        corpus = replace(corpus, source=without_credentials(corpus.source))
        run_dir = run_folder(config, config_name, corpus)
        explanation: list[str] = []
        if settings is not None:
            config, corpus, explanation = size_run(settings, config, corpus, run_dir, accelerator, collectives)
            check_config(config, collectives, accelerator, sized=True)
        config = without_secrets(config)
        stack.enter_context(memory_explained(config))
        window_plan(config, len(corpus.train))  # refuses a text that is too small before a run folder is made
        watchdog.advice = lambda: summary.resume_hint(run_dir)
        collectives.run_on_all(lambda: stack.enter_context(exclusive(run_dir)) if collectives.is_main else None)
        start = find_start(config, corpus, run_dir, collectives, resume=resume)
        recorder = collectives.run_on_all(lambda: open_recorder(config, corpus, run_dir, start, accelerator))
        stack.callback(recorder.close)
        signals = StopSignals(watchdog.shorten_timeout)
        peak = peak_flops(accelerator.device, accelerator.mixed_precision) if collectives.is_main else None
        with signals.handled():
            trainer = Trainer(
                config,
                corpus,
                start,
                accelerator,
                run_dir,
                recorder,
                control=Control(collectives, signals, watchdog.heartbeat),
                peak_flops=peak and peak * collectives.world_size,
            )
            if collectives.is_main:
                announce(trainer, start, explanation, console)
            return train_and_export(trainer, watchdog)


def set_up(config: RunConfig, console: Console) -> Accelerator:
    """Set up processes, logging, threads and memory. Raises: ConfigError."""
    accelerator = make_accelerator(config.train)
    level = logging.WARNING if accelerator.is_local_main_process else logging.ERROR
    configure_logging(logging.INFO if accelerator.is_main_process else level, ConsoleHandler(console))
    set_threads(config.train.threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def train_and_export(trainer: Trainer, watchdog: Watchdog) -> Path | None:
    """Train, then export the best checkpoint on the main process.

    Args:
        trainer: The run.
        watchdog: This rank's.

    Returns:
        The model file on the main process.

    Raises:
        CharRNNError: As `run` does.
    """
    try:
        with trainer.recorder.display or contextlib.nullcontext(), watchdog.training():
            trainer.fit()
        # On all: a launcher takes the first rank that exits for a failure, and ends the others.
        model_file = trainer.control.collectives.run_on_all(lambda: finish(trainer))
    except RuntimeError as error:
        failure = watchdog.find_failure() if is_collective_error(error) else None
        if failure is None:
            raise
        trainer.recorder.close()
        watchdog.exit(failure)
    if stopped_by := trainer.control.stopped_by:
        message = summary.stopped_line(stopped_by, trainer.progress.step, trainer.checkpoints.run_dir)
        raise stop_error(stopped_by, message)
    trainer.accelerator.end_training()
    return model_file


def finish(trainer: Trainer) -> Path | None:
    """Export the best checkpoint on the main process, unless the run was stopped, and end the tracker's run."""
    run_dir, progress = trainer.checkpoints.run_dir, trainer.progress
    if trainer.control.stopped_by or not trainer.accelerator.is_main_process:
        trainer.recorder.finish({}, None, progress.step)
        return None
    best = load_for_inference(run_dir / BEST)
    model_file = run_dir / "model.onnx"
    difference = export_checkpoint(best, model_file)
    for line in summary.closing_lines(trainer.data, progress, best, run_dir, model_file, difference):
        logger.info(line)
    trainer.recorder.finish(best.trainer["metrics"], model_file, best.step)
    return model_file


def announce(trainer: Trainer, start: StartingPoint, explanation: list[str], console: Console) -> None:
    """Log what is known before the first step, and show the progress from where the run stands."""
    config, steps, run_dir = trainer.config, trainer.schedule.total_steps, trainer.checkpoints.run_dir
    facts = (config, trainer.data, start, trainer.accelerator, run_dir, trainer.model.num_parameters(), steps)
    for line in [*summary.opening_lines(*facts), *explanation]:
        logger.info(line)
    schedule, epoch = trainer.schedule, trainer.data.plan.steps_per_epoch
    trainer.recorder.display = Display(
        steps, epoch, schedule.share, schedule.remaining_s, start_step=trainer.progress.step, console=console
    )


def run_folder(config: RunConfig, config_name: str, corpus: Corpus) -> Path:
    """The run's folder: train.run_dir, else checkpoints/[CONFIG-]CORPUS. Raises a ConfigError if it is the corpus."""
    name = f"{config_name}-{corpus.name}" if config_name else corpus.name
    run_dir = expand_user(config.train.run_dir or Path("checkpoints") / name)
    if expand_user(config.data.source).resolve() == run_dir.resolve():
        raise ConfigError(f"--data {config.data.source} is the run folder too; choose another --run-dir")
    return run_dir


def without_secrets(config: RunConfig) -> RunConfig:
    """The config as it may be stored and sent to a tracker: URLs without users, passwords and queries."""
    cleaned = {name: without_credentials(getattr(config.data, name)) for name in ("source", "mirror")}
    return config.model_copy(update={"data": config.data.model_copy(update=cleaned)})


def check_config(config: RunConfig, collectives: Collectives, accelerator: Accelerator, *, sized: bool) -> None:
    """Check that all ranks have the same config, and if it is `sized`, that it fits their number.

    Raises:
        ConfigError: On every rank.
    """
    check_same_config(collectives.all_gather(shared_fields(config, accelerator.mixed_precision)))
    if sized:
        check_processes(config, accelerator.num_processes)


@contextlib.contextmanager
def watch_peers(config: RunConfig, collectives: Collectives) -> Iterator[Watchdog]:
    """Run the watchdog inside the block, if there are several processes and `train.peer_timeout` is not 0."""
    timeout_s, rank, world_size = config.train.peer_timeout, collectives.rank, collectives.world_size
    if world_size == 1 or not timeout_s:
        yield Watchdog(None, 0, 1, timeout_s)
        return
    store = connect_store(timeout_s, collectives.all_gather(uuid.uuid4().hex)[0])
    watchdog = Watchdog(store, rank, world_size, timeout_s)
    collectives.barrier()
    with watchdog.running():
        yield watchdog


def find_start(
    config: RunConfig, corpus: Corpus, run_dir: Path, collectives: Collectives, *, resume: bool
) -> StartingPoint:
    """Where the run starts, the same on every rank. Raises a CheckpointError as `starting_point` does."""
    collectives.run_on_all(lambda: remove_unfinished(run_dir) if collectives.is_main else None)
    start = collectives.run_on_all(lambda: starting_point(config, corpus, run_dir, resume=resume))
    step = start.resumed.step if start.resumed else 0
    check_same_start(collectives.all_gather((step, corpus.sha256)), run_dir)
    return start


def open_recorder(
    config: RunConfig, corpus: Corpus, run_dir: Path, start: StartingPoint, accelerator: Accelerator
) -> Recorder:
    """This rank's recorder; the main process writes config.yaml too. Raises a CheckpointError if it cannot."""
    if not accelerator.is_main_process:
        return Recorder()
    with os_errors(CheckpointError, f"cannot write to run folder {run_dir}", "choose another --run-dir"):
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if is_finished(config, corpus, start):  # the tracker has it all
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"tracker": "none"})})
    tracked = {**config.model_dump(mode="json"), "corpus": identity_fields(corpus)}
    tracked["processes"] = accelerator.num_processes
    step = start.resumed.step if start.resumed else 0
    log = MetricsLog(run_dir / "metrics.jsonl", step)
    return Recorder(log, lambda: make_tracker(config.tracking, run_dir, tracked, step))


def is_finished(config: RunConfig, corpus: Corpus, start: StartingPoint) -> bool:
    """Whether the checkpoint to resume is the end of a run, so that nothing is left to train or evaluate."""
    if not start.resumed:
        return False
    schedule = Schedule(config, window_plan(config, num_trained(config, corpus)).steps_per_epoch)
    schedule.progress = Progress.of(start.resumed.trainer)
    return schedule.progress.evaluated_step == schedule.progress.step and schedule.done()
