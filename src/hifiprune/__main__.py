"""`python -m hifiprune` is the command line."""

from hifiprune.start import main

main()
