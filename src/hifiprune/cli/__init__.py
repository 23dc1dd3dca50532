"""The command line: options, commands and tables."""
