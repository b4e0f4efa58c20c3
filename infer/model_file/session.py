"""onnxruntime sessions with a limit on what a model file costs: memory while it is open, time while it is tried.

What a graph allocates depends on shapes that only running it shows, and how often a loop runs on numbers that it
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
_FATAL_ONLY = 4

_registering = Lock()


def open_session(data: bytes, threads: int) -> Any:
    """Return a CPU session of an ONNX model, whose runs fail if they take more memory than a model of its size.

    Args:
        data: The file's bytes.
        threads: CPU threads an operator may use.

    Raises:
        Exception: onnxruntime's, for a file that it cannot load.
    """
    options = onnxruntime.SessionOptions()
    # Errors are raised too; onnxruntime's own lines on stderr would only repeat them.
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Else onnxruntime's own format, which has not been validated, would be read as well.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit = onnxruntime.OrtArenaCfg({"max_mem": MEMORY_BYTES + _MEMORY_PER_FILE_BYTE * len(data)})
    # A session keeps the allocator that is registered when it is made, so that each has its own.
    with _registering:
        onnxruntime.create_and_register_allocator(place, limit)
        # Constant folding would run at load what depends on constants alone: nothing in our files, anything in others.
        # Fallback would print to stdout, and try the same again.
        return onnxruntime.InferenceSession(
            data,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
            enable_fallback=False,
        )


def run_with_timeout(session: Any, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
    """Run a session for at most `_TRIAL_S` seconds. Raises onnxruntime's exceptions, also on a timeout."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL_ONLY
    end = Timer(_TRIAL_S, setattr, (options, "terminate", True))
    end.daemon = True
    end.start()
    try:
        return session.run(outputs, feeds, options)
    finally:
        end.cancel()


def is_out_of_memory(error: Exception) -> bool:
    """Whether onnxruntime failed for lack of memory, the machine's or what a session may take."""
    return any(words in str(error) for words in ("Available memory of", "bad_alloc", "Failed to allocate memory"))


def reason(error: Exception) -> str:
    """Return onnxruntime's message of a failed run, in plain words where a limit ended it."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return "it takes more memory than a model of its size should"
    if "terminate flag" in text:
        return f"it was not done in {_TRIAL_S:g} s"
    return text
