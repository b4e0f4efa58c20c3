"""Checkpoints: the folder format, asynchronous writing, and what a run resumes or fine-tunes from."""
