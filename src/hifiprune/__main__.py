"""`python -m hifiprune` is the command line."""

from hifiprune.cli.start import main

main()
