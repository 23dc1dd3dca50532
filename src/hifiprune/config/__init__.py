"""The options of every command, each written down once: flags, files, run.json and Python calls derive from them."""
