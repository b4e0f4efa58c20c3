"""From a command line without --config to the config of the run: the recipe's choices under the user's own."""

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from charrnn.config import BASE, SCRATCH, UNSIZED, ModelConfig, RunConfig, load_config
from charrnn.data.corpus import Corpus
from charrnn.errors import CheckpointError
from charrnn.model.rnn import CharRNN
from charrnn.windows import sampled_stream_batch
from train.base import base_folder
from train.checkpoint.format import Checkpoint, load_for_inference, step_folders
from train.checkpoint.resume import origin_folder
from train.checkpoint.vocab_transfer import fine_tuning_start
from train.dataloader import IdSource
from train.distributed.collectives import Collectives
from train.evaluate import nll_sum
from train.probe import UNDISTURBED, Speed, training_speed
from train.recipe import Facts, Recipe, choose

# The network that speed is measured with when training starts from scratch.
_PROBED = ModelConfig(rnn="LSTM", num_layers=1, hidden_dim=512, embedding_dim=64, layer_norm=True)
_PROBED_ON_GPU = _PROBED.model_copy(update={"embedding_dim": 128})
# Share of a text in Latin script, with ASCII's digits and marks, from which on the English base helps.
_MOSTLY_LATIN = 0.9
_COUNTED = 1 << 20
# Characters on which given weights are judged.
_SAMPLED = 4096
_FASTER = 1.1


@dataclass(frozen=True)
class Chosen:
    """What the user set: options ("section.key" -> value), and --set assignments, which come over them."""

    options: dict[str, Any] = field(default_factory=dict)
    assignments: tuple[str, ...] = ()

    def over(self, fields: dict[str, Any]) -> RunConfig:
        """The config of `fields` under these. Raises: ConfigError."""
        return load_config(None, {**fields, **self.options}, self.assignments)

    def over_file(self, path: Path) -> RunConfig:
        """The config of a file under these. Raises: ConfigError."""
        return load_config(path, self.options, self.assignments)

    def sets(self, prefix: str) -> bool:
        """Whether the user set a field whose "section.key" begins so."""
        keys = [*self.options, *(assignment.partition("=")[0].strip() for assignment in self.assignments)]
        return any(key.startswith(prefix) for key in keys)


def initial_config(chosen: Chosen) -> RunConfig:
    """What is needed before the corpus and the machine are known. Raises: ConfigError."""
    return chosen.over(UNSIZED)


def sized(
    chosen: Chosen, config: RunConfig, corpus: Corpus, run_dir: Path, accelerator: Accelerator, collectives: Collectives
) -> tuple[RunConfig, list[str]]:
    """The run's config, the same on every rank, and lines that explain it.

    A run folder with checkpoints keeps the config that they were made with. Where other processes use the cores, one
    thread trains if that is faster, unless the user set their number. Raises: CharRNNError.
    """
    # Rank 0's, so that all take the same way where they do not share the run folder.
    before = collectives.all_gather(collectives.run_on_all(lambda: _config_before(chosen, run_dir)))[0]
    if before:
        _, lines = _measured(training_speed(before.model, len(corpus.vocab), accelerator), config)
        return before, lines
    init_from, origin = collectives.run_on_all(lambda: _origin(chosen, config, corpus))
    on_gpu = accelerator.device.type == "cuda"
    probed = origin.config.model if origin else (_PROBED_ON_GPU if on_gpu else _PROBED)
    speed, lines = _measured(training_speed(probed, len(corpus.vocab), accelerator), config)
    facts = Facts(
        characters=corpus.num_chars,
        symbols=len(corpus.vocab),
        flops=sum(collectives.all_gather(speed)),
        budget_s=config.train.time_limit,
        epochs=config.train.epochs if chosen.sets("train.epochs") else 0.0,
        origin=origin.config.model if origin else None,
        init_from=init_from,
        origin_loss=collectives.run_on_all(lambda: _loss(origin, init_from, config, corpus)) if origin else 0.0,
        on_gpu=on_gpu,
        share=collectives.world_size * config.train.accumulation_steps,
    )
    recipe = collectives.all_gather(choose(facts))[0]
    resolved = collectives.run_on_all(lambda: chosen.over(_compatible(recipe, config)))
    expectation = [f"small     {recipe.expectation}"] if recipe.expectation else []
    return resolved, [f"recipe    {recipe.summary}", *expectation, *lines]


def _config_before(chosen: Chosen, run_dir: Path) -> RunConfig | None:
    """The config of the run that the folder holds, under what the user set now; None when it holds none."""
    if step_folders(run_dir) and (run_dir / "config.yaml").exists():
        return chosen.over_file(run_dir / "config.yaml")
    return None


def _compatible(recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    """The recipe's fields, less those that have no meaning under what the user set."""
    fields = dict(recipe.fields)
    if config.data.windows == "sliding" and "data.windows" in fields:
        del fields["data.reset"]
    return fields


def _origin(chosen: Chosen, config: RunConfig, corpus: Corpus) -> tuple[str, Checkpoint | None]:
    """The weights to start from; none and None from scratch."""
    init_from = config.train.init_from
    if not chosen.sets("train.init_from"):
        init_from = BASE if base_helps(chosen, config, corpus) else SCRATCH
    return init_from, None if init_from == SCRATCH else load_for_inference(origin_folder(init_from))


def _loss(origin: Checkpoint, init_from: str, config: RunConfig, corpus: Corpus) -> float:
    """The loss of the weights on a sample of the training split before training on it, nats/char."""
    start = fine_tuning_start(origin, config, corpus, init_from)
    model = CharRNN(origin.config.model, len(start.vocab), start.vocab.document_end_id).eval()
    model.load_state_dict(start.weights)
    ids = IdSource(corpus.train, torch.device("cpu"), start.table)
    nll, count = nll_sum(model, ids, [sampled_stream_batch(len(ids), _SAMPLED, 16, 64)]).tolist()
    return nll / count


def base_helps(chosen: Chosen, config: RunConfig, corpus: Corpus) -> bool:
    """Whether the recipe fine-tunes the base: the user asked for no other network, and the text is mostly Latin."""
    shape = ("rnn", "num_layers", "hidden_dim", "embedding_dim", "layer_norm")
    if corpus.vocab.kind != "chars" or any(chosen.sets(f"model.{name}") for name in shape):
        return False
    try:
        base_folder()
    except CheckpointError:
        return False
    counts = np.bincount(corpus.train[:_COUNTED], minlength=len(corpus.vocab))  # (V,)
    latin = [ord(unicodedata.normalize("NFKD", symbol)[0]) < 128 for symbol in corpus.vocab.symbols]  # (V,)
    return bool(counts[latin].sum() >= _MOSTLY_LATIN * counts.sum())


def _measured(speed: Speed, config: RunConfig) -> tuple[float, list[str]]:
    """FLOP/s with the threads that training will use, and a line where other processes use the cores."""
    threads = torch.get_num_threads()
    if speed.cpu_share >= UNDISTURBED:
        return speed.flops, []
    line = f"shared    other processes use these cores: {threads} thread(s) had {speed.cpu_share:.0%} of their time"
    if speed.one_thread <= _FASTER:
        return speed.flops, [line]
    line += f", and 1 thread is {speed.one_thread:.1f} times as fast"
    if config.train.threads:
        return speed.flops, [f"{line}; --set train.threads=1 uses one"]
    torch.set_num_threads(1)
    return speed.flops * speed.one_thread, [f"{line}; training with 1 (--set train.threads={threads} for {threads})"]
