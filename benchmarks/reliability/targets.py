"""Names of the product that the faults depend on: functions they strike in, and messages they expect.

A test resolves each function and finds each message in the sources, so that a rename fails at once.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

# "module:qualified name". The first five are phases, in which a fault strikes at a line of a call.
FUNCTIONS = {
    "step": "train.loop.trainer:Trainer.train_step",
    "write": "train.checkpoint.folders:write_folder",
    "replacement": "train.checkpoint.folders:_replace",
    "evaluation": "train.loop.trainer:Trainer.evaluate",
    "pruning": "train.checkpoint.folders:remove",
    "fit": "train.loop.trainer:Trainer.fit",
    "loss": "charrnn.model.rnn:NextCharLoss.forward",
    "batch": "charrnn.windows:WindowPlan.batch",
}
# A line of "replacement", between the renames of the old folder and of the new one.
BETWEEN_RENAMES = "temporary.rename(folder)"

# {} stands for what a message is filled with.
MESSAGES = {
    "stopped": "stopped by {} after step {}; {}",
    "resume": "rerun the same command to resume from {}",
    "again": "Ctrl-C again exits immediately",
    "died": "rank {} {} died or stopped responding",
    "hung": "rank {} {} made no progress",
    "store lost": "lost connection to the rendezvous store {}; {}",
    "diverged": "training diverged at step",
    "corrupted": "an index is corrupted",
    "different": "would train on different windows",
    "damaged": "skipping a damaged checkpoint",
    "foreign": "from another run: ",
    "none whole": "none of the {} checkpoint",
    "resumed": "resumed at step",
    "cannot write": "cannot write {}; free space",
    "locked": "another run trains in {} (process {} on ",
}


def locate(name: str) -> tuple[Any, str]:
    """Returns the module or class that holds a function of FUNCTIONS, and its name there."""
    module, qualified = FUNCTIONS[name].split(":")
    *owners, attribute = qualified.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def replace(name: str, changed: Callable[..., Any]) -> None:
    """Replaces a function of FUNCTIONS, in every module that has imported it by name too."""
    owner, attribute = locate(name)
    function = getattr(owner, attribute)
    setattr(owner, attribute, changed)
    for module in list(sys.modules.values()):
        if vars(module).get(attribute) is function:
            setattr(module, attribute, changed)


def message(name: str, *values: str) -> str:
    """Returns a regular expression of a message; `values`, themselves expressions, fill the first placeholders."""
    first, *others = map(re.escape, MESSAGES[name].split("{}"))
    filled = [*values, *[r"[^\n]*"] * (len(others) - len(values))]
    return first + "".join(value + text for value, text in zip(filled, others, strict=True))
