"""`python -m sparse_marlin` is the command line."""

from .cli import main

main()
