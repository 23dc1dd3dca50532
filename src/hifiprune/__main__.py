"""`python -m hifiprune` is the command line."""

from hifiprune.cli import main

main()
