"""Faults injected into runs, and what must survive them."""
