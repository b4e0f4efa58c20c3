"""Processes and devices of a run: setup, collectives besides gradients, the watchdog, signals."""
