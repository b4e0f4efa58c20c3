"""Sizing of a run without --config: the recipe's choices, overridden by the user's settings."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from charrnn.config import BASE, SCRATCH, UNSIZED, ModelConfig, RunConfig, load_config
from charrnn.cores import UNDISTURBED
from charrnn.data.corpus import Corpus
from charrnn.windows import sampled_stream_batch
from train.checkpoint.folders import step_folders
from train.checkpoint.format import Checkpoint, load_for_inference, network
from train.checkpoint.resume import SHAPE, origin_folder
from train.checkpoint.vocab_transfer import fine_tuning_start
from train.distributed.collectives import Collectives
from train.loop.dataloader import IdSource
from train.loop.evaluation import nll_sum, read
from train.recipe import base_model
from train.recipe.machine_speed import Speed, training_speed
from train.recipe.rules import Facts, choose, validation_split

# The model whose speed is measured for training from scratch.
_PROBED = ModelConfig(rnn="LSTM", num_layers=1, hidden_dim=512, embedding_dim=64, layer_norm=True)
_PROBED_ON_GPU = _PROBED.model_copy(update={"embedding_dim": 128})
_MIN_SPEEDUP = 1.1
_LOSS_CHARS = 4096  # sample on which the loss of given weights is estimated


@dataclass(frozen=True)
class UserSettings:
    """What the user set.

    Attributes:
        options: "section.key" -> value.
        assignments: --set assignments, which override the options.
    """

    options: dict[str, Any] = field(default_factory=dict)
    assignments: tuple[str, ...] = ()

    def apply(self, fields: dict[str, Any], path: Path | None = None) -> RunConfig:
        """The config of a file, if any, and `fields`, overridden by these settings. Raises: ConfigError."""
        return load_config(path, {**fields, **self.options}, self.assignments)

    def sets(self, prefix: str) -> bool:
        """Whether the user set a field whose "section.key" begins with `prefix`."""
        keys = [*self.options, *(assignment.partition("=")[0].strip() for assignment in self.assignments)]
        return any(key.startswith(prefix) for key in keys)


def size_run(
    settings: UserSettings,
    config: RunConfig,
    corpus: Corpus,
    run_dir: Path,
    accelerator: Accelerator,
    collectives: Collectives,
) -> tuple[RunConfig, Corpus, list[str]]:
    """Choose what the user did not set. A run folder with checkpoints keeps its config.

    If other processes use the cores, one thread trains if that is faster, unless the user set their number.

    Args:
        settings: What the user set.
        config: The config before corpus and machine are known, `UNSIZED` with the settings.
        corpus: The text.
        run_dir: The run folder.
        accelerator: The device.
        collectives: The ranks.

    Returns:
        The config, equal on all ranks, the corpus as it cuts it, and lines that explain it.

    Raises:
        CharRNNError: If the settings are invalid or the weights to start from cannot be loaded.
    """
    # Rank 0's, so that all take the same branch if they do not share the run folder.
    previous = collectives.all_gather(collectives.run_on_all(lambda: _previous_config(settings, run_dir)))[0]
    if previous:
        _, lines = _choose_threads(training_speed(previous.model, len(corpus.vocab), accelerator), config)
        return previous, replace(corpus, split=previous.data.split), lines
    unsized = {**UNSIZED, "data.split": validation_split(corpus.num_chars)}
    corpus = replace(corpus, split=collectives.run_on_all(lambda: settings.apply(unsized)).data.split)
    init_from, origin = collectives.run_on_all(lambda: _origin(settings, config, corpus))
    on_gpu = accelerator.device.type == "cuda"
    probed = origin.config.model if origin else (_PROBED_ON_GPU if on_gpu else _PROBED)
    flops, lines = _choose_threads(training_speed(probed, len(corpus.vocab), accelerator), config)
    facts = Facts(
        characters=corpus.num_chars,
        symbols=len(corpus.vocab),
        flops=sum(collectives.all_gather(flops)),
        budget_s=config.train.time_limit,
        epochs=config.train.epochs if settings.sets("train.epochs") else 0.0,
        origin=origin.config.model if origin else None,
        init_from=init_from,
        origin_loss=collectives.run_on_all(lambda: _loss(origin, init_from, config, corpus)) if origin else 0.0,
        ngram_loss=corpus.ngram_loss if origin else None,
        on_gpu=on_gpu,
        share=collectives.world_size * config.train.accumulation_steps,
    )
    recipe = collectives.all_gather(choose(facts))[0]
    fields = {**UNSIZED, **recipe.fields}
    if config.data.windows == "sliding":  # the user's choice: these two are of carried rows
        del fields["data.reset"], fields["data.segment"]
    resolved = collectives.run_on_all(lambda: settings.apply(fields))
    expectation = [f"small     {recipe.expectation}"] if recipe.expectation else []
    return resolved, corpus, [f"recipe    {recipe.summary}", *expectation, *lines]


def _previous_config(settings: UserSettings, run_dir: Path) -> RunConfig | None:
    """The config of the run in the folder, overridden by the user's settings; None if there is none."""
    path = run_dir / "config.yaml"
    return settings.apply({}, path) if step_folders(run_dir) and path.exists() else None


def _origin(settings: UserSettings, config: RunConfig, corpus: Corpus) -> tuple[str, Checkpoint | None]:
    """`train.init_from` and the checkpoint to start from; None from scratch."""
    init_from = config.train.init_from
    if not settings.sets("train.init_from"):
        other_model = any(settings.sets(f"model.{name}") for name in SHAPE)
        init_from = BASE if not other_model and base_model.suits(corpus) else SCRATCH
    return init_from, None if init_from == SCRATCH else load_for_inference(origin_folder(init_from))


def _loss(origin: Checkpoint, init_from: str, config: RunConfig, corpus: Corpus) -> float:
    """Loss of the given weights on a sample of the training split, nats/char."""
    start = fine_tuning_start(origin, config, corpus, init_from)
    model = network(origin.config.model, start.vocab, start.weights).eval()
    ids = IdSource(corpus.train, torch.device("cpu"), start.table)
    nll, count = nll_sum(read(model, ids, [sampled_stream_batch(len(ids), _LOSS_CHARS, 16, 64)])).tolist()
    return nll / count


def _choose_threads(speed: Speed, config: RunConfig) -> tuple[float, list[str]]:
    """Set the number of threads. Returns FLOP/s with them, and a line if other processes use the cores."""
    threads = torch.get_num_threads()
    if speed.cpu_share >= UNDISTURBED:
        return speed.flops, []
    line = f"shared    other processes use these cores: {threads} thread(s) had {speed.cpu_share:.0%} of their time"
    if speed.one_thread <= _MIN_SPEEDUP:
        return speed.flops, [line]
    line += f", and 1 thread is {speed.one_thread:.1f} times as fast"
    if config.train.threads:
        return speed.flops, [f"{line}; --set train.threads=1 uses one"]
    torch.set_num_threads(1)
    return speed.flops * speed.one_thread, [f"{line}; training with 1 (--set train.threads={threads} for {threads})"]
