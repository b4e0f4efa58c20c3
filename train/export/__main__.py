"""Entry of `python -m train.export`."""

from train.export.exporter import main

main()
