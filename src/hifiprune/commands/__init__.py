"""One file a command: what is checked, computed and written, told in order."""
