"""The recipe of a run without --config: model and schedule from the text's size, the machine's speed and the budget.

A pure function of `Facts`. docs/quality.md has the experiments behind each rule.
Letters: N characters of the training split, C characters to train on (with repetition), P parameters.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from charrnn.config import BASE, SCRATCH, ModelConfig
from train.loop.flops import flops_per_char

# Models from small to large: num_layers, hidden_dim, embedding_dim.
_SIZES = ((1, 128, 32), (1, 256, 64), (1, 512, 64), (2, 512, 128), (2, 1024, 256))
# On a GPU inputs and widths are multiples of 128, as cuDNN's persistent kernel takes them.
_GPU_SIZES = ((1, 128, 128), (1, 256, 128), (1, 512, 128), (2, 512, 128), (2, 1024, 256))
# Maximum default budget, seconds.
MOST_DEFAULT_S = 300.0
_MOST_VALIDATION = 1 << 17
_EVALUATIONS = 16
_PATIENCE = 6
# Fraction of a run for evaluations on a sample: these, and two of four times the sample at the end.
_EVALUATION_SHARE, _SAMPLES = 0.05, _EVALUATIONS + 8
# Characters of warm-up for each, and the least that it counts.
_WARM_UP, _LEAST_SAMPLE = 2048, 1024
_CHECKPOINT_S = 60.0
_SMALL_TEXT = 20_000
# Sizes of a text from which a GPU takes more rows: 16, 32, 64, 128.
_ROWS_DOUBLE_AT = (50_000, 250_000, 10_000_000)
# Windows of a segment, in runs of less than an epoch.
_SEGMENT_WINDOWS = 32
# Characters to train on from which a CPU takes larger batches.
_LONG_RUN = 2_000_000
# Loss in nats/char up to which a text counts as similar to the given weights' own: the base has 1.0 to 1.2 on novels.
_LIKE_THEIRS = 1.1
# Steps below which a novel text is fine-tuned at a higher rate.
_SHORT_RUN = 400
# Size of the base model's corpus, and FLOPs of its training.
_BASE_CHARS, _BASE_FLOPS = 68_000_000, 8.5e15


@dataclass(frozen=True)
class Facts:
    """Inputs of the recipe.

    Attributes:
        characters: Characters of the complete text.
        symbols: V, vocabulary size.
        flops: FLOP/s of training steps over all processes.
        budget_s: Time limit in seconds; 0 = the recipe chooses.
        epochs: Passes requested by the user; 0 = the recipe chooses.
        origin: Shape of the weights to start from, None from scratch.
        init_from: Name of those weights.
        origin_loss: Their loss on the text before training, nats/char.
        ngram_loss: Held-out loss of an n-gram model counted on the text, nats/char; None = unknown.
        on_gpu: Whether the processes train on GPUs.
        share: Divisor of the batch size: processes x accumulation steps.
    """

    characters: int
    symbols: int
    flops: float
    budget_s: float = 0.0
    epochs: float = 0.0
    origin: ModelConfig | None = None
    init_from: str = SCRATCH
    origin_loss: float = 0.0
    ngram_loss: float | None = None
    on_gpu: bool = False
    share: int = 1


@dataclass(frozen=True)
class Recipe:
    """The recipe's choice.

    Attributes:
        summary: One line on what was chosen and why.
        fields: "section.key" -> value of the config.
        expectation: What to expect of a very small text; empty for others.
    """

    summary: str
    fields: dict[str, Any] = field(default_factory=dict)
    expectation: str = ""


def choose(facts: Facts) -> Recipe:
    """Choose model and schedule. The user's own settings override the fields it returns."""
    split = validation_split(facts.characters)
    length = max(1, int(facts.characters * split[0]))  # N
    if facts.init_from == BASE and _outgrows_the_base(facts, length):
        facts = replace(facts, origin=None, init_from=SCRATCH)
    model = facts.origin or _network(facts, length)
    speed = facts.flops / flops_per_char(model, facts.symbols)  # characters/s
    most_epochs = facts.epochs or _useful_epochs(facts, length)
    # Passes requested by the user have no default time limit.
    limit_s = facts.budget_s or (0.0 if facts.epochs else MOST_DEFAULT_S)
    chars = min(most_epochs * length, limit_s * speed or math.inf)  # C
    epochs = chars / length
    dropout = _dropout(epochs, fine_tuning=facts.origin is not None)
    rows, seq_len = _batch(facts, length, chars)
    steps = chars / (rows * seq_len)
    steps_per_s = speed / (rows * seq_len)
    fields = {
        "data.split": split,
        "data.windows": "carry",
        "data.batch_size": rows,
        "data.seq_len": seq_len,
        "data.reset": 0.05,
        "data.segment": _SEGMENT_WINDOWS * seq_len if epochs < 1 else 0,
        "model.rnn": model.rnn,
        "model.embedding_dim": model.embedding_dim,
        "model.hidden_dim": model.hidden_dim,
        "model.num_layers": model.num_layers,
        "model.layer_norm": model.layer_norm,
        "model.dropout": dropout,
        "model.dropout_mask": "window",
        "optim.lr": _learning_rate(facts, model, length, chars, steps),
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": max(1, min(100, round(steps / 20))),
        "optim.final_lr": 0.02,
        "train.init_from": facts.init_from,
        "train.epochs": most_epochs,
        "train.time_limit": limit_s,
        "eval.every": 0,
        "eval.times": _EVALUATIONS,
        "eval.sample": _sample(facts, chars),
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


def validation_split(characters: int) -> list[float]:
    """Fractions of train, val and test: a tenth for validation, of a long text less."""
    held_out = min(0.1, _MOST_VALIDATION / characters)
    return [1.0 - held_out, held_out, 0.0]


def _outgrows_the_base(facts: Facts, length: int) -> bool:
    """Whether text and budget far exceed those of the base model: then a larger model learns more."""
    return length > _BASE_CHARS and facts.flops * (facts.budget_s or MOST_DEFAULT_S) > 3 * _BASE_FLOPS


def _distance(facts: Facts) -> float:
    """Distance of the text from the given weights' own: 1 for similar text, at most 4.5."""
    return min(4.5, max(1.0, facts.origin_loss / _LIKE_THEIRS))


def _novelty(facts: Facts) -> float:
    """How much the text tells of itself that the given weights do not know: 1 little, 2 much.

    An n-gram model counted on the text is as good as they are for 1, a quarter better for 2.
    """
    if not facts.ngram_loss:
        return 1.0
    return min(2.0, max(1.0, 4.0 * facts.origin_loss / facts.ngram_loss - 3.0))


def _useful_epochs(facts: Facts, length: int) -> int:
    """Passes over N characters after which more hardly help: fewer for a long text, and for a similar one."""
    if not facts.origin:
        return max(1, min(60, round(40 * (20_000 / length) ** 0.25)))
    return max(1, min(24, round(5 * _distance(facts) * (20_000 / length) ** (0.5 if length < 20_000 else 0.1))))


def _network(facts: Facts, length: int) -> ModelConfig:
    """The largest LSTM that the compute budget can train, and the text does not overfit."""
    budget_s = facts.budget_s or MOST_DEFAULT_S
    by_compute = 0.3 * math.sqrt(facts.flops * budget_s)  # P, fitted to runs of 3e13 and 1.2e14 FLOPs
    by_text = max(25 * length, 400_000)  # P, with dropout
    chosen = _SIZES[0]
    for layers, width, embedding in _GPU_SIZES if facts.on_gpu else _SIZES:
        recurrent = 4 * width * (embedding + width) + (layers - 1) * 8 * width * width
        parameters = recurrent + facts.symbols * (width + embedding)
        if parameters <= min(by_compute, by_text):
            chosen = layers, width, embedding
    layers, width, embedding = chosen
    return ModelConfig(rnn="LSTM", num_layers=layers, hidden_dim=width, embedding_dim=embedding, layer_norm=True)


def _dropout(epochs: float, *, fine_tuning: bool) -> float:
    """Dropout, which grows with the passes from two on; in steps of 0.05."""
    passes = math.log2(max(2.0, epochs) / 2.0)
    dropout = min(0.3, 0.05 * passes) if fine_tuning else min(0.6, 0.12 * passes)
    return round(20 * dropout) / 20


def _learning_rate(facts: Facts, model: ModelConfig, length: int, chars: float, steps: float) -> float:
    """Peak learning rate: from scratch by the depth of the model.

    For fine-tuning by N, C, the text's distance and novelty; higher for a novel text in a short run.
    """
    if not facts.origin:
        return 0.003 if model.num_layers > 1 else 0.01
    by_length = 1.0 if _has_small_batches(facts, chars) else min(3.0, max(1.0, (length / 100_000) ** 0.4))
    by_distance = min(0.006, 0.0008 * by_length * _distance(facts))
    novelty = _novelty(facts)
    shortness = min(1.0, max(0.0, math.log2(_SHORT_RUN / steps)))
    by_novelty = min(0.003, 0.0008 * novelty * _distance(facts)) * novelty**shortness
    return float(f"{max(by_distance, by_novelty):.2g}")


def _has_small_batches(facts: Facts, chars: float) -> bool:
    """Whether the run is short: of few characters more steps learn more. The larger batch is up to a quarter faster."""
    return not facts.on_gpu and chars < _LONG_RUN


def _batch(facts: Facts, length: int, chars: float) -> tuple[int, int]:
    """Global batch_size and seq_len; a batch is at most a quarter of the text."""
    eights = 1
    if facts.on_gpu:
        # A process has 8 to 128 rows, by eights, as cuDNN's persistent kernel takes them.
        rows = 16 << sum(length >= size for size in _ROWS_DOUBLE_AT)
        seq_len = 64 if rows < 128 else 128
        rows, eights = max(rows, 8 * facts.share), 8
    else:
        rows, seq_len = (16, 64) if _has_small_batches(facts, chars) else (32, 96)
    seq_len = max(1, min(seq_len, length // 8, length // (4 * facts.share)))
    rows = max(1, min(rows, length // (4 * seq_len)))
    unit = facts.share * (eights if rows >= eights * facts.share else 1)
    return max(facts.share, rows // unit * unit), seq_len


def _sample(facts: Facts, chars: float) -> int:
    """Characters of an evaluation before the last. Reading one costs a CPU a sixth of training on it."""
    reading_cost = 1.0 if facts.on_gpu else 1 / 6
    return max(_LEAST_SAMPLE, int(_EVALUATION_SHARE / _SAMPLES / reading_cost * chars) - _WARM_UP)


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
