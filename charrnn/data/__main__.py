"""Entry of `python -m charrnn.data`."""

from charrnn.data.inspect import main

main()
