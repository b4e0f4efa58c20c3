"""charrnn: character-level recurrent language models; what training and inference share.

Importing this package imports nothing heavy: torch is loaded by `charrnn.model` alone.
"""

__version__ = "0.1.0"
