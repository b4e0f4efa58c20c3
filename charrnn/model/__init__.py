"""The network and its loss. The only part of charrnn that imports torch."""
