"""The commands shown in launch/ and docs/distributed.md, parsed as the programs they call parse them."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

import train.run
from charrnn.config import RunConfig
from train import main

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "distributed.md"
SCRIPT = "train/main.py"
_PROGRAMS = r"accelerate launch|torchrun|python|sbatch|launch/several-cpus\.sh|kubectl|sky|docker"
_COMMAND = rf"(?:[A-Z_]+=\S+ )*(?:{_PROGRAMS}) \S.*"


def header(path: Path) -> str:
    """The comment that a file of launch/ begins with, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("#!"):
        lines = lines[1:]
    end = next(i for i, line in enumerate(lines) if not re.match(r"#( |$)", line))
    return "\n".join(line.removeprefix("#") for line in lines[:end])


def commands_of(path: Path) -> list[str]:
    """Commands of a file's header (indented lines), or of the guide (its tables, text and bash blocks)."""
    if path != GUIDE:
        return re.findall(rf"^   ({_COMMAND})$", header(path), re.MULTILINE)
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", outside) if re.fullmatch(_COMMAND, span) and ".." not in span]
    return re.findall(rf"^ *({_COMMAND})$", blocks, re.MULTILINE) + spans


def training_options(command: str) -> list[str] | None:
    """The options that a command hands to train/main.py; None when it starts no training by itself.

    Raises: SystemExit when the launcher refuses its own options, AssertionError when a file is not there.
    """
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[:2] == ["accelerate", "launch"]:
        return _of_launcher(launch_command_parser().parse_args(words[2:]))
    if words[0] == "torchrun":
        return _of_launcher(get_args_parser().parse_args(words[1:]))
    if words[0] == "python":
        assert words[1] == SCRIPT
        return words[2:]
    if words[0] in ("sbatch", "launch/several-cpus.sh"):
        script, *options = words[1:] if words[0] == "sbatch" else words
        assert (ROOT / script).exists()
        return options
    assert all((ROOT / word).exists() for word in words if word.startswith("launch/"))
    return None


def accepted(options: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path = ROOT) -> RunConfig:
    """The config that train/main.py makes of `options`, run from `folder`."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(train.run, "run", lambda config, **_: seen.append(config))
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main.app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (config,) = seen
    return config


def _of_launcher(parsed) -> list[str]:
    assert parsed.training_script == SCRIPT
    config_file = getattr(parsed, "config_file", None)
    assert not config_file or (ROOT / config_file).exists()
    return parsed.training_script_args
