"""Checkpoint folders: their format, the background writer, and what a run resumes from."""
