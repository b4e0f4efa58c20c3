"""onnxruntime with an end to what a model file costs: memory for as long as its session lives, time while it is tried.

What a graph allocates depends on shapes that only running it tells, and how often a loop turns on numbers that it
computes; so the limits are set on onnxruntime itself rather than found by reading the file.
"""

from threading import Lock, Timer
from typing import Any

import onnxruntime

# Reading 4096 characters at once takes some hundreds of MiB in the largest models, and 10,000 streams no more.
MEMORY_BYTES = 2 << 30
# Weights, and the same rearranged for the loop and for what reads the prompt.
_MEMORY_PER_FILE_BYTE = 8
_TRIAL_S = 30.0

_registering = Lock()


def open_session(data: bytes, options: onnxruntime.SessionOptions) -> Any:
    """A session of an ONNX model on the CPU, which fails when it would take more memory than a model of its size.

    Its runs raise onnxruntime's exception then. Raises: the same, for a file that it cannot load.
    """
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    most = MEMORY_BYTES + _MEMORY_PER_FILE_BYTE * len(data)
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Else onnxruntime's own format, which nothing here has looked into, would be read as well.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # A session keeps the allocator that is registered when it is made, so that each has its own.
    with _registering:
        onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg({"max_mem": most}))
        # Folding would run, at load, what depends on constants alone: nothing in a file of ours, anything in others.
        # Falling back would print to stdout, and try the same again.
        return onnxruntime.InferenceSession(
            data,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
            enable_fallback=False,
        )


def run_briefly(session: Any, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
    """A run that is ended after `_TRIAL_S` seconds. Raises: onnxruntime's exceptions, also when it was ended."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    end = Timer(_TRIAL_S, setattr, (options, "terminate", True))
    end.daemon = True
    end.start()
    try:
        return session.run(outputs, feeds, options)
    finally:
        end.cancel()


def is_memory(error: Exception) -> bool:
    """Whether onnxruntime failed for want of memory, the machine's or what a session may take."""
    return any(words in str(error) for words in ("Available memory of", "bad_alloc", "Failed to allocate memory"))


def told(error: Exception) -> str:
    """What onnxruntime says of a run that failed, in plain words where a limit ended it."""
    text = " ".join(str(error).split())
    if is_memory(error):
        return "it takes more memory than a model of its size should"
    if "terminate flag" in text:
        return f"it was not done in {_TRIAL_S:g} s"
    return text
