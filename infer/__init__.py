"""infer: text from a charrnn model file, with onnxruntime and numpy alone.

`from infer import Engine, SamplingOptions` loads them when they are first asked for; `import infer` by itself imports
nothing heavy.
"""

from typing import TYPE_CHECKING

from charrnn import cores as cores  # which measures free cores from here on

if TYPE_CHECKING:
    from charrnn.sampling import SamplingOptions
    from infer.engine import Engine

__all__ = ["Engine", "SamplingOptions"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from infer.engine import Engine

        return Engine
    if name == "SamplingOptions":
        from charrnn.sampling import SamplingOptions

        return SamplingOptions
    raise AttributeError(f"module 'infer' has no attribute {name!r}")
