"""Configs: shipped files, faults reported together, and one default an option."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from charrnn.config import RunConfig, dump_config, field_names, load_config, parse_duration
from charrnn.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert isinstance(load_config(path, {}), RunConfig)


def test_the_promised_configs_are_shipped():
    assert {"plain.yaml", "shakespeare.yaml", "base.yaml", "lstm.yaml"} <= {p.name for p in CONFIGS}


def test_plain_yaml_spells_every_field_with_its_default_and_its_comment():
    text = (ROOT / "configs" / "plain.yaml").read_text()
    assert load_config(ROOT / "configs" / "plain.yaml", {}) == RunConfig()
    spelled = [f"{section}.{key}" for section, fields in yaml.safe_load(text).items() for key in fields]
    assert spelled == field_names()
    for section, info in RunConfig.model_fields.items():
        block = text.split(f"\n{section}:\n")[1]
        for key, field in info.annotation.model_fields.items():
            assert field.description, f"{section}.{key} has no description"
            assert re.search(rf"^  {key}: .*# {re.escape(field.description)}$", block, re.M), f"{section}.{key}"


def test_the_seeds_defaults_hold():
    config = RunConfig()
    assert (config.model.rnn, config.model.embedding_dim, config.model.hidden_dim) == ("GRU", 256, 256)
    assert (config.model.num_layers, config.data.seq_len, config.data.batch_size) == (2, 128, 128)
    assert config.data.split == (0.9, 0.1, 0.0)


def test_all_faults_are_reported_together_with_the_nearest_names():
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            {"optim.lr": -1},
            ["data.batchsize=3", "modle.rnn=GRU", "model.hidden=3", "train.epochs=lots", "oops", "model.rnn=RNN"],
        )
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "optim.lr = -1: must be greater than 0",
        "data.batchsize (nearest: data.batch_size)",
        "modle (nearest: model)",
        "model.hidden (nearest: model.hidden_dim)",
        "train.epochs = 'lots'",
        "--set 'oops': write section.key=value",
        "model.rnn = 'RNN': must be 'GRU' or 'LSTM'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("assignment", "clause"),
    [
        ("data.split=[0.5,0.1,0.0]", "must add up to 1"),
        ("data.seq_len=0", "greater than or equal to 1"),
        ("sample.top_p=0", "greater than 0"),
        ("model.dropout=1", "less than 1"),
        ("train.epochs=0", "would never end"),
        ("train.time_limit=soon", "not a duration"),
        ("train.mixed_precision=fp8", "'auto', 'native', 'no', 'fp16' or 'bf16'"),
    ],
)
def test_a_value_out_of_range_is_refused(assignment, clause):
    with pytest.raises(ConfigError, match=clause):
        load_config(None, {}, [assignment])


def test_options_come_over_the_file_and_assignments_over_options(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {hidden_dim: 32, num_layers: 3}\noptim: {lr: 2e-3}\n")
    config = load_config(path, {"model.hidden_dim": 64}, ["model.hidden_dim=96", "tracking.name=a b"])
    assert (config.model.hidden_dim, config.model.num_layers, config.tracking.name) == (96, 3, "a b")
    assert config.optim.lr == 0.002


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("1h30m", 5400), ("0.5h", 1800), ("90", 90), (7, 7)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("assignment", "value"),
    [("|", "|"), ("'|'", "|"), ('"\\n"', "\n"), ("~", "~"), ("5", "5"), ("no", "no"), ("'", "'"), ("", "")],
)
def test_values_of_text_fields_are_text(assignment, value):
    assert load_config(None, {}, [f"tracking.name={assignment}"]).tracking.name == value


@pytest.mark.parametrize(
    "text",
    [
        "data: {seq_len: 64, seq_len: 128}",
        "data: {seq_len: 64}\ndata: {batch_size: 8}",
        "data: {seq_len: yes}",
        "data: {seq_len: true}",
        "data: {seq_len: 010}",
        "data: {seq_len: 1_000}",
        "data: {seq_len: 1:30}",
        "data: {seq_len: 0x10}",
        "train: {epochs: .inf}",
        "train: {time_limit: .inf}",
        "train: {time_limit: .nan}",
        "optim: {betas: [0.9, 1.0]}",
        "train: {seed: 18446744073709551616}",
        f"train: {{seed: {'9' * 5000}}}",
        "train: {threads: 100000}",
        "train: {peer_timeout: 1e300}",
        "model: {hidden_dim: 1000000000}",
        'data: {source: "a\\0b"}',
        "data: {stride: 8, windows: carry}",
        "a: " + "[" * 20_000,
        "a: 2024-99-99",
        "a: [",
        "- 1\n- 2\n",
        "just text",
        "a: &a [*a]",
        "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12)),
    ],
)
def test_what_yaml_or_a_number_would_hide_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("off", False), ("True", True), ("false", False)])
def test_truth_values_may_be_spelt_as_in_yaml(tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(f"model: {{layer_norm: {text}}}")
    assert load_config(tmp_path / "c.yaml", {}).model.layer_norm is value


def test_a_missing_config_names_the_nearest_shipped_one(tmp_path):
    with pytest.raises(ConfigError, match=r"configs/shakespeare\.yaml"):
        load_config(tmp_path / "shakespear.yaml", {})


def test_the_dumped_config_loads_as_itself(tmp_path):
    config = load_config(ROOT / "configs" / "shakespeare.yaml", {}, ["sample.prompt='é: '", "train.mixed_precision=no"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path, {}) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        RunConfig().model.hidden_dim = 3


@pytest.mark.parametrize("name", ["auto", "latin-1", "UTF-16", "koi8_r", "cp1252", "gb18030", "utf-8-sig"])
def test_an_encoding_is_any_codec_of_text(name):
    assert load_config(None, {"data.encoding": name}).data.encoding == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("latn-1", "latin-1"), ("utf-9", "utf-8"), ("base64", ""), ("punycode", ""), ("undefined", "")],
)
def test_an_unknown_encoding_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=rf"'{name}' is no encoding of text \(nearest: {nearest}"):
        load_config(None, {"data.encoding": name})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vocab": "bytes", "encoding": "latin-1"}, "vocab bytes reads files as they are"),
        ({"vocab": "bytes", "normalize": "NFC"}, "vocab bytes reads files as they are"),
        ({"vocab": "bytes", "min_count": 2}, "min_count 2 chooses among the corpus's own characters"),
        ({"vocab": "v.json", "min_count": 2}, "min_count 2 chooses among the corpus's own characters"),
        ({"unknown": "skip"}, "vocab chars leaves no character unknown"),
        ({"windows": "sliding", "reset": 0.1}, "reset 0.1 applies to windows carry"),
        ({"windows": "sliding", "segment": 64}, "segment 64 applies to windows carry"),
    ],
)
def test_options_of_the_text_that_would_do_nothing_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        load_config(None, {f"data.{key}": value for key, value in options.items()})
