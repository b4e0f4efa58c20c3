"""Ablations of fine-tuning the base: the recipe's settings with one change at a time.

    python -m benchmarks.quality.fine_tuning --text shakespeare=tinyshakespeare.txt@400000 --size 20000 --size 100000

Each row trains on the first nine tenths of a text and reports the lowest `stream` loss (nats/char, bf16) of
16 evaluations on the last tenth, over seeds. Steps are counted, not seconds: the machine's load changes nothing.
Beyond what a config can set, it tries a lower learning rate for lower layers (discriminative fine-tuning, Howard and
Ruder, arXiv 1801.06146), decay towards the weights of the start (L2-SP, arXiv 1802.01483) and averaging with them
(WiSE-FT, arXiv 2109.01903).
"""

import itertools
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.common import machine_line, markdown, markdown_head, run
from benchmarks.quality.any_text import cut
from charrnn.config import BASE, ModelConfig, OptimConfig
from charrnn.data.stats import ngram_loss
from charrnn.model.rnn import CharRNN, NextCharLoss, detach, zeroed
from charrnn.vocab import Vocab
from charrnn.windows import WindowPlan, stream_batch
from train.checkpoint.folders import base_folder
from train.checkpoint.format import load_for_inference
from train.checkpoint.vocab_transfer import transfer_weights
from train.loop.dataloader import IdSource
from train.loop.evaluation import nll_sum
from train.loop.optimizer import lr_at
from train.recipe.rules import Facts, choose

_COLUMNS = ("text", "characters", "variant", "`stream`, mean", "range", "against the recipe")
_EVALUATIONS = 16
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One change of the recipe. Factors multiply the recipe's value.

    Attributes:
        dropout: Added to the recipe's.
        layer_lr: Factor of the learning rate from each layer to the one below.
        l2_sp: Strength of the decay towards the starting weights, a multiple of the learning rate.
        average: Share of the starting weights in the weights that are evaluated.
    """

    lr: float = 1.0
    passes: float = 1.0
    dropout: float = 0.0
    rows: float = 1.0
    layer_lr: float = 1.0
    l2_sp: float = 0.0
    average: float = 0.0
    weight_decay: float = 0.01


VARIANTS = {
    "recipe": Variant(),
    "learning rate x 0.5": Variant(lr=0.5),
    "learning rate x 2": Variant(lr=2.0),
    "dropout - 0.1": Variant(dropout=-0.1),
    "dropout + 0.15": Variant(dropout=0.15),
    "passes x 0.5": Variant(passes=0.5),
    "passes x 2": Variant(passes=2.0),
    "half the rows": Variant(rows=0.5),
    "layer-wise learning rate 0.7": Variant(layer_lr=0.7),
    "decay towards the base (L2-SP)": Variant(l2_sp=0.3),
    "averaged with the base, 0.2": Variant(average=0.2),
    "weight decay 0.1": Variant(weight_decay=0.1),
}


@dataclass
class Run:
    """A model in training on one text. ids: (N,), the first `split` of them for training."""

    ids: np.ndarray[Any, Any]
    split: int
    model: CharRNN
    start: dict[str, Tensor] = field(default_factory=dict)

    def evaluate(self, average: float) -> float:
        """`stream` on the held-out tenth, nats/char, with `average` of the starting weights mixed in."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        if average:
            self.model.load_state_dict({name: tensor.lerp(self.start[name], average) for name, tensor in kept.items()})
        held_out = IdSource(self.ids[self.split :], _CPU)
        with torch.autocast("cpu", torch.bfloat16):
            nll, count = nll_sum(self.model.eval(), held_out, [stream_batch(len(held_out), 16, 512)]).tolist()
        self.model.load_state_dict(kept)
        self.model.train()
        return nll / count

    def ngram_loss(self) -> float:
        """As the recipe is told it, nats/char."""
        return ngram_loss(self.ids[: self.split], self.ids[self.split :], len(self.start["head.bias"]))


def started(text: str, dropout: float) -> Run:
    """The base on the vocabulary of `text`."""
    base = load_for_inference(base_folder())
    vocab = Vocab("chars", tuple(sorted(set(text))))
    ids = vocab.encode(text)
    model = CharRNN(replace_dropout(base.config.model, dropout), len(vocab))
    weights = {name: tensor.float() for name, tensor in base.weights.items()}
    model.load_state_dict(transfer_weights(weights, base.vocab, vocab))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Run(np.asarray(ids), int(len(ids) * 0.9), model, start)


def replace_dropout(model: ModelConfig, dropout: float) -> ModelConfig:
    """The same network with another dropout, one mask a window."""
    return model.model_copy(update={"dropout": dropout, "dropout_mask": "window"})


def groups(model: CharRNN, variant: Variant) -> list[dict[str, Any]]:
    """AdamW's parameter groups, each with the factor of its learning rate."""

    def depth(name: str) -> int:
        if name.startswith("head"):
            return 0
        return 1 if "_l1" in name or name.startswith("norms.1") else 2 if "_l0" in name or "norms.0" in name else 3

    return [
        {
            "params": [parameter],
            "weight_decay": variant.weight_decay if parameter.dim() > 1 else 0.0,
            "factor": variant.layer_lr ** depth(name),
        }
        for name, parameter in model.named_parameters()
    ]


def fine_tune(text: str, variant: Variant, seed: int) -> tuple[float, float]:
    """The lowest loss of the evaluations, nats/char, and the share of the run at which it was reached."""
    torch.manual_seed(seed)
    before = started(text, 0.0)
    base = load_for_inference(base_folder()).config.model
    known, told = before.evaluate(0.0), before.ngram_loss()
    facts = Facts(len(text), len(set(text)), 1e15, 3600.0, origin=base, init_from=BASE)
    facts = replace(facts, origin_loss=known, ngram_loss=told)
    recipe = choose(facts).fields
    dropout = min(0.9, max(0.0, recipe["model.dropout"] + variant.dropout))
    tuned = replace(before, model=CharRNN(replace_dropout(base, dropout), len(before.start["head.bias"])))
    tuned.model.load_state_dict(before.start)
    rows, seq_len = max(1, int(recipe["data.batch_size"] * variant.rows)), recipe["data.seq_len"]
    plan = WindowPlan(tuned.split, seq_len, rows, "carry", 0, seed, recipe["data.reset"])
    steps = max(1, round(plan.steps_per_epoch * recipe["train.epochs"] * variant.passes))
    optim = OptimConfig(lr=recipe["optim.lr"] * variant.lr, final_lr=0.02, warmup_steps=max(1, min(100, steps // 20)))
    optimizer = torch.optim.AdamW(groups(tuned.model, variant), lr=optim.lr, betas=optim.betas, fused=True)
    source, loss_module = IdSource(tuned.ids[: tuned.split], _CPU), NextCharLoss(tuned.model)
    state, losses = tuned.model.zero_state(rows, _CPU), []
    for step in range(steps):
        lr = lr_at(step, optim, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        batch = plan.batch(step)
        state = zeroed(state, torch.from_numpy(batch.reset)) if batch.reset.any() else state
        with torch.autocast("cpu", torch.bfloat16):
            loss, state = loss_module(source.windows(batch.starts, seq_len + 1), state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state = detach(state)
        if variant.l2_sp:
            with torch.no_grad():
                for name, parameter in tuned.model.named_parameters():
                    parameter.lerp_(tuned.start[name], lr * variant.l2_sp)
        if (step + 1) * _EVALUATIONS // steps > step * _EVALUATIONS // steps:
            losses.append((tuned.evaluate(variant.average), (step + 1) / steps))
    return min(losses)


def main(
    text: Annotated[list[str], typer.Option(metavar="NAME=FILE[@START]", help="A text, from a character on.")],
    size: Annotated[list[int], typer.Option(help="Characters of each text; 0 = all.")],
    variant: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(VARIANTS)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of each row.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print one row for each text, size and variant."""
    torch.set_num_threads(threads)
    print(f"{machine_line()}\n")
    print("\n".join(markdown_head(_COLUMNS)), flush=True)
    for length, given in itertools.product(size, text):
        name, content = cut(given, length)
        reference = 0.0
        for label in variant or VARIANTS:
            losses = [fine_tune(content, VARIANTS[label], n)[0] for n in seed or [1, 2, 3]]
            reference = reference or mean(losses)
            spread, change = f"{min(losses):.4f} to {max(losses):.4f}", mean(losses) - reference
            cells = [name, f"{len(content):,}", label, f"{mean(losses):.4f}", spread, f"{change:+.4f}"]
            print(markdown(cells), flush=True)


if __name__ == "__main__":
    run(main)
