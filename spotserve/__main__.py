"""`python -m spotserve` is the command line."""

from spotserve.cli.app import main

main()
