"""The configuration of a run: what can be set, in which unit and range, and how YAML and options become one.

`configs/plain.yaml` spells every field with its comment; a test holds the two together.
"""

import codecs
import difflib
import re
import reprlib
from collections.abc import Sequence
from encodings.aliases import aliases
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from charrnn.errors import ConfigError, missing_extra

try:
    import yaml
    from pydantic import (
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        ValidationInfo,
        field_validator,
        model_validator,
    )
except ModuleNotFoundError as error:
    raise missing_extra(error, "train") from None

KEEP = "keep"  # data.vocab: the pretrained model's
BASE, SCRATCH = "base", "none"  # train.init_from: the shipped base model, random weights
# What a run without --config begins with, before the recipe has sized the rest.
UNSIZED = {"data.windows": "carry", "train.mixed_precision": "native"}
# What PyYAML raises for text that is none, or for a value that its tag does not allow.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
_NO_ENCODINGS = ("undefined", "idna", "punycode")  # Python's codecs that no file is written in
_LARGEST = 2**53  # of a number without a bound of its own: the integers that every float64 holds
_MOST_BYTES = 1 << 20  # of a config file
_SHORT = reprlib.Repr()  # values in messages
_SHORT.maxstring = _SHORT.maxother = 80
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value: object) -> object:
    """Seconds from a number, or from text such as "90", "90s", "2m" or "1h30m"."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\d+(\.\d+)?", value, re.ASCII):
        return float(value)
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", value, re.ASCII):
        raise ValueError(f"{_SHORT.repr(value)} is not a duration; write 90, 90s, 2m or 1h30m")
    return sum(float(n) * _UNITS[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([smhd])", value))


def check_encoding(name: str) -> str:
    """The name, when it is auto or that of a codec for text. Raises: ValueError otherwise."""
    if name == "auto":
        return name
    try:
        codec = codecs.lookup(name)
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        codec = None
    if codec is None or not codec._is_text_encoding or codec.name in _NO_ENCODINGS:
        known = ["auto", *(alias.replace("_", "-") for alias in sorted({*aliases, *aliases.values()}))]
        close = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1, cutoff=0.5)
        raise ValueError(f"{name!r} is no encoding of text (nearest: {close[0] if close else 'utf-8'})")
    return name


def parse_interval(value: object) -> object:
    """A number of steps, or a time as text with its unit, such as "30s". Raises: ValueError for anything else."""
    if isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?[smhd])+", value, re.ASCII):
        return value
    if isinstance(value, int) and value >= 0:
        return value
    raise ValueError(f"{_SHORT.repr(value)} is no interval; write a number of steps, or a time such as 1s or 10m")


def seconds(interval: str) -> float:
    """Seconds of an interval that is a time."""
    return float(parse_duration(interval))  # type: ignore[arg-type]


Duration = Annotated[float, BeforeValidator(parse_duration)]
Interval = Annotated[int | str, BeforeValidator(parse_interval)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _check_text(text: str) -> None:
    """Raises: ValueError for a NUL character, which no path holds, and for what is not valid Unicode."""
    if "\0" in text:
        raise ValueError(f"{_SHORT.repr(text)} has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{_SHORT.repr(text)} is not valid UTF-8") from None


class Section(BaseModel):
    """A group of fields: immutable, and without any that are not declared; its numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: object, info: ValidationInfo) -> object:
        """Refuses what pydantic would convert to a number, and what no number, path or name may be."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"{str(value).lower()} is neither a number nor text; put it in quotes for text")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{_SHORT.repr(value)} is too large; numbers go up to {_LARGEST}")
        if info.field_name not in ("prompt", "document_end"):
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str):
                    _check_text(text)
        return value


class ModelConfig(Section):
    """The network."""

    rnn: Literal["GRU", "LSTM"] = Field("GRU", description="the recurrent cell")
    embedding_dim: int = Field(256, ge=1, le=65_536, description="E, width of a character's embedding")
    hidden_dim: int = Field(256, ge=1, le=65_536, description="H, width of a layer's state")
    num_layers: int = Field(2, ge=1, le=256, description="L, recurrent layers")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout probability, on embeddings, between layers and before the output"
    )
    dropout_mask: Literal["character", "window"] = Field(
        "character", description="a new mask for every character, or one per window (variational dropout)"
    )
    layer_norm: bool = Field(False, description="apply LayerNorm to each layer's output")


class DataConfig(Section):
    """The corpus and how it is cut into batches."""

    source: str = Field("shakespeare", min_length=1, description="file, folder, glob, URL, hf:NAME, - or a corpus name")
    cache_dir: str = Field("data", description="folder for downloads and prepared corpora")
    mirror: str = Field("", description="folder or URL tried before the public ones; empty = none")
    encoding: str = Field("auto", description="codec of the files; auto = UTF-8, or UTF-16 or 32 by byte order mark")
    invalid: Literal["refuse", "replace"] = Field(
        "refuse", description="invalid bytes: refuse the corpus, or replace them by U+FFFD"
    )
    newlines: Literal["universal", "keep"] = Field("universal", description="convert line ends to \\n, or keep them")
    normalize: Literal["none", "NFC", "NFD", "NFKC", "NFKD"] = Field("none", description="Unicode normalization form")
    vocab: str = Field(
        "chars",
        min_length=1,
        description="the corpus's characters, all 256 bytes, a vocabulary file, or keep: that of --init-from",
    )
    min_count: int = Field(1, ge=1, description="rarer characters share one replacement entry; 1 = keep all")
    unknown: Literal["error", "skip", "replace"] = Field(
        "error", description="characters missing from a vocabulary file: refuse, drop, or use its replacement entry"
    )
    text_field: str = Field(
        "", description="field of .jsonl, .parquet and hf: records that holds the text; empty = text"
    )
    include: tuple[str, ...] = Field(
        (), description="patterns of files to include from a folder, glob or zip; none = all"
    )
    exclude: tuple[str, ...] = Field((), description="patterns of files and folders to exclude")
    document_end: str = Field(
        "", max_length=1, description="character after each document, where the hidden state is reset; empty = none"
    )
    split: tuple[Fraction, Fraction, Fraction] = Field(
        (0.9, 0.1, 0.0), description="fractions of train, val and test, contiguous in this order; they sum to 1"
    )
    batch_size: int = Field(
        128, ge=1, le=1 << 24, description="B, windows in a global batch, over all processes and accumulation steps"
    )
    seq_len: int = Field(128, ge=1, le=1 << 24, description="T, characters of truncated backpropagation through time")
    windows: Literal["sliding", "carry"] = Field(
        "sliding", description="shuffled windows from a zero state, or B rows whose state is carried"
    )
    stride: int = Field(0, ge=0, description="characters between sliding windows; 0 = seq_len (no overlap)")
    reset: Fraction = Field(0.0, description="probability of resetting the hidden state at a window boundary (carry)")
    segment: int = Field(
        0,
        ge=0,
        description="length in characters of segments of rows, shuffled every epoch (carry); 0 = contiguous rows",
    )

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str) -> str:
        return check_encoding(name)

    @model_validator(mode="after")
    def _options_apply(self) -> "DataConfig":
        if abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ValueError(f"split {list(self.split)} must add up to 1 and give the training part more than 0")
        if self.vocab == "bytes" and (self.encoding, self.normalize) != ("auto", "none"):
            raise ValueError("vocab bytes reads files as they are; leave encoding at auto and normalize at none")
        if self.vocab == "bytes" and not self.document_end.isascii():
            raise ValueError(f"document_end {self.document_end!r} is more than one byte; with vocab bytes use ASCII")
        if self.vocab != "chars" and self.min_count > 1:
            what = f"min_count {self.min_count} chooses among the corpus's own characters"
            raise ValueError(f"{what}; set vocab to chars")
        if self.vocab in ("chars", "bytes", KEEP) and self.unknown != "error":
            what = f"vocab {self.vocab} leaves no character unknown"
            raise ValueError(f"{what}; unknown {self.unknown} needs a file there")
        if self.stride and self.windows == "carry":
            raise ValueError(f"stride {self.stride} is of sliding windows; set stride to 0, or windows to sliding")
        if self.reset and self.windows == "sliding":
            what = f"reset {self.reset} applies to windows carry"
            raise ValueError(f"{what}; sliding windows start from a zero state; set it to 0")
        if self.segment and self.windows == "sliding":
            raise ValueError(f"segment {self.segment} applies to windows carry; set it to 0, or windows to carry")
        return self


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(0.002, gt=0, le=1e6, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="AdamW's beta1 and beta2")
    weight_decay: float = Field(0.01, ge=0, le=1e6, description="AdamW's weight decay, on matrices only; 0 = off")
    grad_clip: float = Field(1.0, ge=0, description="maximum global gradient norm; 0 = no clipping")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="learning rate schedule after the warm-up"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up from 0")
    final_lr: Fraction = Field(0.05, description="fraction of lr at the end of cosine and linear")


class TrainConfig(Section):
    """How long and how to train. The first limit that is reached ends the run."""

    epochs: float = Field(20, ge=0, le=1e9, description="passes over the training split; 0 = no limit")
    max_steps: int = Field(0, ge=0, description="optimizer steps; 0 = no limit")
    time_limit: Duration = Field(
        0.0, ge=0, le=1e9, description="seconds, or 90s, 2m, 1h30m, without the last evaluation; 0 = no limit"
    )
    accumulation_steps: int = Field(1, ge=1, description="micro-batches per optimizer step")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none", description="how optim.lr grows with data.batch_size / lr_batch_size"
    )
    lr_batch_size: int = Field(0, ge=0, le=1 << 24, description="batch_size that optim.lr is meant for; 0 = none")
    noise_scale_every: int = Field(
        200, ge=0, description="steps between measurements of the gradient noise scale (half a step at most); 0 = never"
    )
    seed: int = Field(1, ge=0, description="random seed")
    init_from: str = Field(
        SCRATCH, min_length=1, description="weights to fine-tune: a run, a checkpoint, base, or none = random ones"
    )
    mixed_precision: Literal["auto", "native", "no", "fp16", "bf16"] = Field(
        "auto", description="auto = the launcher's; native = fp16 on a GPU, bf16 on a CPU that has it, else no"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads per process; 0 = all cores / local processes")
    run_dir: str = Field("", description="run folder; empty = checkpoints/<config>-<corpus>")
    processes: int = Field(0, ge=0, description="required number of processes; 0 = any")
    peer_timeout: Duration = Field(
        600.0, ge=0, le=1e9, description="heartbeat timeout in seconds, or 30s, 10m; 0 disables"
    )
    bucket_mb: int = Field(25, ge=1, le=65_536, description="MiB per gradient all-reduce (DDP bucket)")
    grad_compression: Literal["none", "bf16", "fp16"] = Field(
        "none", description="type in which gradients are communicated"
    )
    deterministic: bool = Field(
        False, description="deterministic cuBLAS and cuDNN algorithms on a GPU, which may be slower"
    )
    cuda_graph: Literal["auto"] | bool = Field(
        "auto", description="replay the training step as one CUDA graph; auto = where it can be captured"
    )

    @model_validator(mode="after")
    def _options_apply(self) -> "TrainConfig":
        if not (self.epochs or self.max_steps or self.time_limit):
            raise ValueError("epochs, max_steps and time_limit are all 0, so the run would never end; set one")
        if (self.lr_scaling == "none") != (self.lr_batch_size == 0):
            what = f"lr_scaling {self.lr_scaling} and lr_batch_size {self.lr_batch_size} go together"
            remedy = "set both, the latter to the batch_size that optim.lr is meant for, or neither"
            raise ValueError(f"{what}: {remedy}")
        return self


class DistillConfig(Section):
    """Distillation: training on the mean of teachers' probabilities as well as on the text."""

    teachers: tuple[str, ...] = Field((), description="runs or checkpoints with the same vocabulary; none = off")
    weight: Fraction = Field(0.9, description="weight of the teachers in the loss; the text has the rest")
    temperature: float = Field(1.0, gt=0, le=1e6, description="divides logits before the softmax, the teachers' too")
    generated: int = Field(0, ge=0, le=1 << 40, description="characters of the teachers' own text to train on as well")

    @model_validator(mode="after")
    def _generated_by_teachers(self) -> "DistillConfig":
        if self.generated and (not self.teachers or self.temperature != 1):
            raise ValueError("generated needs teachers, which generate at temperature 1: set both, or generated to 0")
        return self


class EvalConfig(Section):
    """Evaluation on the validation split, by both protocols."""

    every: int = Field(250, ge=0, description="steps between evaluations; 0 = as times sets, and at the end")
    times: int = Field(0, ge=0, description="evaluations spread evenly over the run, in addition to every; 0 = none")
    sample: int = Field(
        0, ge=0, description="characters read by evaluations before the last, in training precision; 0 = all, in fp32"
    )
    window: int = Field(256, ge=1, le=1 << 24, description="window length of the `windows` protocol, characters")
    batch_rows: int = Field(64, ge=1, le=1 << 24, description="windows per evaluation batch")
    stream_lanes: int = Field(16, ge=1, le=1 << 24, description="parallel rows of the `stream` protocol")
    stream_warmup: int = Field(
        512, ge=0, le=1 << 24, description="uncounted characters that warm up the state of the rows after the first"
    )
    best_by: Literal["stream", "windows"] = Field(
        "stream", description="protocol whose loss selects the best checkpoint"
    )
    patience: int = Field(0, ge=0, description="evaluations without improvement before early stopping; 0 = off")


class LogConfig(Section):
    """metrics.jsonl, the display and the tracker."""

    every: Interval = Field(
        "1s", description="steps, or a time such as 1s, between records of mean training loss; 0 = only at the end"
    )


class CheckpointConfig(Section):
    """Step checkpoints, from which the same command resumes."""

    every: Interval = Field(
        "1m", description="steps, or a time such as 1m, between step checkpoints; 0 = only at the end"
    )
    keep: int = Field(2, ge=1, description="number of step checkpoints to retain, in addition to best/")


class SampleConfig(Section):
    """The text written at each evaluation."""

    prompt: str = Field("\n", min_length=1, description="prompt; characters outside the vocabulary are dropped")
    length: int = Field(200, ge=0, le=1 << 24, description="characters; 0 = no sample")
    every: int = Field(1, ge=1, description="evaluations between samples")
    temperature: float = Field(0.8, ge=0, le=1e6, description="sampling temperature; 0 = greedy")
    top_k: int = Field(0, ge=0, description="sample from the k most likely characters; 0 = all")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus (top-p) threshold; 1 = off")
    seed: int = Field(0, ge=0, description="sampling seed")


class TrackingConfig(Section):
    """Where metrics are logged in addition to metrics.jsonl, which always has all of them."""

    tracker: Literal["none", "wandb", "tensorboard"] = Field("none", description="tracker to log metrics to")
    project: str = Field("charrnn", min_length=1, description="the tracker's project")
    name: str = Field("", description="run name; empty = the run folder's name")
    group: str = Field("", description="group of the run's segments; empty = the run name")
    artifact: bool = Field(True, description="upload the best model file at the end (wandb)")


class RunConfig(Section):
    """Everything that can be set for a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    distill: DistillConfig = DistillConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()


def load_config(path: Path | None, overrides: dict[str, Any], assignments: Sequence[str] = ()) -> RunConfig:
    """The config of `path` (defaults when None), then `overrides` ("section.key" -> value), then `--set` assignments.

    Raises: ConfigError that names every fault at once, each with the nearest valid name or the allowed values.
    """
    tree = _read_yaml(path) if path else {}
    faults: list[str] = []
    for key, value in [*overrides.items(), *_parse_assignments(assignments, faults)]:
        section, _, field = key.partition(".")
        group = tree.setdefault(section, {})
        if isinstance(group, dict):
            group[field] = value
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        faults += [_explain(detail) for detail in error.errors()]
    if faults:
        source = f"{path}: " if path and not assignments and not overrides else ""
        raise ConfigError(source + "; ".join(faults))
    return config


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every field spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def field_names() -> list[str]:
    """Every "section.key" of RunConfig, in order."""
    return [f"{s}.{k}" for s, f in RunConfig.model_fields.items() for k in _section_type(f.annotation).model_fields]


def _section_type(annotation: Any) -> type[Section]:
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


class _Loader(yaml.SafeLoader):
    """YAML 1.1, without its traps: a key twice, and numbers that it would read in base 8 or 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node))
        if not re.fullmatch(r"[-+]?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.(inf|nan|\d+)", text, re.IGNORECASE):
            problem = f"{text[:40]!r} is no decimal number; write digits, or put text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
# YAML 1.1 would also take yes, no, on and off for truth values, and `no` is the name of a precision.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false", re.IGNORECASE), list("tTfF"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path} is larger than {_MOST_BYTES} bytes, and no config is; name another file")
        tree = yaml.load(content.decode(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; shipped ones: {_shipped(path)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:500]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as data: and model:, not a {type(tree).__name__}")
    return tree


def _shipped(path: Path) -> str:
    folder = Path(__file__).resolve().parent.parent / "configs"
    names = sorted(p.name for p in folder.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return ", ".join(f"configs/{n}" for n in close or names) or "none"


def _parse_assignments(assignments: Sequence[str], faults: list[str]) -> list[tuple[str, Any]]:
    parsed: list[tuple[str, Any]] = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            faults.append(f"--set {text!r}: write section.key=value, for example --set data.seq_len=64")
            continue
        key = key.strip()
        try:
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            parsed.append((key, value if _is_text(key) and not quoted else yaml.load(value, _Loader)))
        except _NOT_YAML:
            faults.append(f"--set {key}: {_SHORT.repr(value)} is not a YAML value")
    return parsed


def _is_text(key: str) -> bool:
    """Whether the field "section.key" holds text, which is taken as it is written."""
    section, _, name = key.partition(".")
    if section not in RunConfig.model_fields:
        return False
    field = _section_type(RunConfig.model_fields[section].annotation).model_fields.get(name)
    return field is not None and (field.annotation is str or get_origin(field.annotation) is Literal)


def _explain(detail: Any) -> str:
    """One pydantic error as a clause: which field, what is wrong, what is allowed."""
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown field {where}{_nearest(where)}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("valid dictionary or instance of ", "section of fields, as in ")
    if detail["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where} = {_SHORT.repr(detail['input'])}: {message}"


def _nearest(where: str) -> str:
    known = field_names() + list(RunConfig.model_fields)
    close = difflib.get_close_matches(where, known, n=1, cutoff=0.6)
    if not close:
        key = where.rsplit(".", 1)[-1]
        ends = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        close = [ends[k] for k in difflib.get_close_matches(key, list(ends), n=1, cutoff=0.6)]
    return f" (nearest: {close[0]})" if close else f" (sections: {', '.join(RunConfig.model_fields)})"
