"""Distributed setup: processes and devices, collectives other than gradients, the watchdog, stop signals."""
