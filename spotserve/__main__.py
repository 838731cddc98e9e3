"""`python -m spotserve` is the command line."""

from spotserve.cli import main

main()
