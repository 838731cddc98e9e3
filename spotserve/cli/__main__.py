"""`python -m spotserve.cli` is the command line, too."""

from spotserve.cli.app import main

main()
