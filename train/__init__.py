"""Training: the loop, evaluation, tracking, export. Entry: `accelerate launch train/main.py`."""
