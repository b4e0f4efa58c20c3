"""The recipe: what a run without --config trains, from the text's size, the machine's speed and the time there is.

A pure function from facts to fields of the config. docs/quality.md has the experiments behind each rule.
Letters: N characters of the training split, C characters that will be trained on, P parameters.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from charrnn.config import BASE, SCRATCH, ModelConfig
from train.flops import flops_per_char

# Networks from small to large: layers, hidden_dim, embedding_dim.
_SIZES = ((1, 128, 32), (1, 256, 64), (1, 512, 64), (2, 512, 128), (2, 1024, 256))
# On a GPU inputs and widths are multiples of 128, as cuDNN's persistent kernel takes them (train/cudnn.py).
_GPU_SIZES = ((1, 128, 128), (1, 256, 128), (1, 512, 128), (2, 512, 128), (2, 1024, 256))
# The default budget, in seconds, at most.
MOST_DEFAULT_S = 300.0
_MOST_VALIDATION = 1 << 17
_EVALUATIONS = 16
_PATIENCE = 6
# Share of a run that may go into the evaluations before the last, and what reading a character costs of training on it,
# with the warm-up of each segment.
_EVALUATION_SHARE, _READING_COST = 0.04, 1.0
_CHECKPOINT_S = 60.0
_SMALL_TEXT = 20_000
# Nats/char up to which a text counts as like that which the given weights know: the base has 1.0 on novels.
_LIKE_THEIRS = 1.1
# Of the base model's own text, and of its training.
_BASE_CHARS, _BASE_FLOPS = 68_000_000, 2.5e15


@dataclass(frozen=True)
class Facts:
    """What the recipe knows.

    Attributes:
        characters: Characters of the whole text.
        symbols: V, vocabulary size.
        flops: FLOP/s of training steps over all processes.
        budget_s: Wall-clock limit in seconds; 0 = the recipe chooses.
        epochs: Passes over the text that the user asks for; 0 = the recipe chooses.
        origin: Shape of the weights that training starts from, None from scratch.
        init_from: Name of those weights.
        origin_loss: Their loss on the text before any training, nats/char: how far it is from what they know.
        on_gpu: Whether the processes train on GPUs.
        share: What the batch must be a multiple of: processes x accumulation steps.
    """

    characters: int
    symbols: int
    flops: float
    budget_s: float = 0.0
    epochs: float = 0.0
    origin: ModelConfig | None = None
    init_from: str = SCRATCH
    origin_loss: float = 0.0
    on_gpu: bool = False
    share: int = 1


@dataclass(frozen=True)
class Recipe:
    """fields: "section.key" -> value of the config. summary: what was chosen and why, in one line.

    expectation: what a model of a very small text will be like, empty for others.
    """

    summary: str
    fields: dict[str, Any] = field(default_factory=dict)
    expectation: str = ""


def choose(facts: Facts) -> Recipe:
    """The recipe for `facts`.

    Every field it returns is a default that the user's own settings replace.
    """
    held_out = min(0.1, _MOST_VALIDATION / facts.characters)
    length = max(1, int(facts.characters * (1.0 - held_out)))  # N
    if facts.init_from == BASE and _outgrows_the_base(facts, length):
        facts = replace(facts, origin=None, init_from=SCRATCH)
    model = facts.origin or _network(facts, length)
    speed = facts.flops / flops_per_char(model, facts.symbols)  # characters/s
    most_epochs = facts.epochs or _useful_epochs(facts, length)
    # Passes that the user asks for take the time that they take.
    limit_s = facts.budget_s or (0.0 if facts.epochs else MOST_DEFAULT_S)
    chars = min(most_epochs * length, limit_s * speed or math.inf)  # C
    epochs = chars / length
    dropout = _dropout(epochs, fine_tuning=facts.origin is not None)
    rows, seq_len = _batch(facts, length, model)
    steps = chars / (rows * seq_len)
    steps_per_s = speed / (rows * seq_len)
    fields = {
        "data.split": [1.0 - held_out, held_out, 0.0],
        "data.windows": "carry",
        "data.batch_size": rows,
        "data.seq_len": seq_len,
        "data.reset": 0.05,
        "model.rnn": model.rnn,
        "model.embedding_dim": model.embedding_dim,
        "model.hidden_dim": model.hidden_dim,
        "model.num_layers": model.num_layers,
        "model.layer_norm": model.layer_norm,
        "model.dropout": dropout,
        "model.dropout_mask": "window",
        "optim.lr": _learning_rate(facts, model, length),
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": max(1, min(100, round(steps / 20))),
        "optim.final_lr": 0.02,
        "train.init_from": facts.init_from,
        "train.epochs": most_epochs,
        "train.time_limit": limit_s,
        "eval.every": 0,
        "eval.times": _EVALUATIONS,
        "eval.sample": max(256, int(_EVALUATION_SHARE / _EVALUATIONS / _READING_COST * chars)),
        "eval.patience": _PATIENCE,
        "log.every": max(1, round(steps_per_s)),
        "checkpoint.every": max(1, round(_CHECKPOINT_S * steps_per_s)),
        "sample.length": 100 if chars < 60 * speed else 200,
        "sample.every": _EVALUATIONS // 4,
    }
    start = f"fine-tune {'the base model' if facts.init_from == BASE else facts.init_from}" if facts.origin else "train"
    shape = f"{model.rnn} {model.num_layers} x {model.hidden_dim}"
    if facts.origin:
        shape += f", {facts.origin_loss:.2f} nats/char on this text so far"
    summary = (
        f"{start} ({shape}), dropout {dropout:g}, {rows} rows x {seq_len}: about {_rounded(epochs)} passes over "
        f"{length:,} characters at {speed:,.0f} a second"
    )
    return Recipe(summary, fields, _expectation(facts))


def _outgrows_the_base(facts: Facts, length: int) -> bool:
    """Whether text and budget are much more than the base itself was trained on: then a larger network learns more."""
    return length > _BASE_CHARS and facts.flops * (facts.budget_s or MOST_DEFAULT_S) > 3 * _BASE_FLOPS


def _distance(facts: Facts) -> float:
    """How foreign the text is to the weights that training starts from: 1 for text like theirs, 4.5 at most."""
    return min(4.5, max(1.0, facts.origin_loss / _LIKE_THEIRS))


def _useful_epochs(facts: Facts, length: int) -> int:
    """Passes over N characters after which more hardly helps: fewer for a long text, and for one like the weights'."""
    if not facts.origin:
        return max(1, min(60, round(40 * (20_000 / length) ** 0.25)))
    return max(1, min(24, round(5 * _distance(facts) * (20_000 / length) ** (0.5 if length < 20_000 else 0.1))))


def _network(facts: Facts, length: int) -> ModelConfig:
    """An LSTM for training from scratch: as large as the arithmetic of the budget feeds, and as the text bears."""
    budget_s = facts.budget_s or MOST_DEFAULT_S
    affordable = 0.3 * math.sqrt(facts.flops * budget_s)  # P, by cpu-sized runs of 3e13 and 1.2e14 FLOPs
    borne = 25 * length  # P: 0.4M at 20 KB, with dropout
    chosen = _SIZES[0]
    for layers, width, embedding in _GPU_SIZES if facts.on_gpu else _SIZES:
        recurrent = 4 * width * (embedding + width) + (layers - 1) * 8 * width * width
        parameters = recurrent + facts.symbols * (width + embedding)
        if parameters <= min(affordable, max(borne, 400_000)):
            chosen = layers, width, embedding
    layers, width, embedding = chosen
    return ModelConfig(rnn="LSTM", num_layers=layers, hidden_dim=width, embedding_dim=embedding, layer_norm=True)


def _dropout(epochs: float, *, fine_tuning: bool) -> float:
    """More, the more often each character is seen; in steps of 0.05."""
    passes = math.log2(max(1.0, epochs))
    dropout = min(0.3, 0.05 + 0.05 * passes) if fine_tuning else min(0.6, max(0.0, 0.12 * (passes - 1.0)))
    return round(20 * dropout) / 20


def _learning_rate(facts: Facts, model: ModelConfig, length: int) -> float:
    """Peak learning rate: from pretrained weights by N and the text's distance, else by the depth of the network."""
    if not facts.origin:
        if model.num_layers > 1:
            return 0.003
        return 0.01 if facts.on_gpu else 0.006  # with more rows, as in configs/gpu-quick.yaml
    by_length = min(3.0, max(1.0, (length / 100_000) ** 0.4))
    return float(f"{min(0.006, 0.0008 * by_length * _distance(facts)):.2g}")


def _batch(facts: Facts, length: int, model: ModelConfig) -> tuple[int, int]:
    """Rows of a batch over all processes, and characters in each: never more than a quarter of the text in all."""
    eights = 1
    if facts.on_gpu:
        # A process has 8 to 128 rows, by eights, as cuDNN's persistent kernel takes them.
        rows, seq_len = (64, 64) if length < 10_000_000 else (128, 128)
        rows, eights = max(rows, 8 * facts.share), 8
    else:
        rows, seq_len = (16, 64) if length < 200_000 else (32, 96)
    seq_len = max(1, min(seq_len, length // 8, length // (4 * facts.share)))
    rows = max(1, min(rows, length // (4 * seq_len)))
    unit = facts.share * (eights if rows >= eights * facts.share else 1)
    return max(facts.share, rows // unit * unit), seq_len


def _expectation(facts: Facts) -> str:
    if facts.characters >= _SMALL_TEXT:
        return ""
    what = f"{facts.characters:,} characters are little"
    if facts.origin:
        return (
            f"{what}: expect the general language of the weights that it starts from, with this text's words and layout"
        )
    return f"{what}: expect its words and layout rather than sentences; more text helps most"


def _rounded(epochs: float) -> str:
    return f"{epochs:.0f}" if epochs >= 10 else f"{epochs:.2g}"
