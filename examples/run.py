"""Run the notebook and print its outputs; fail where a cell fails. With `--write` they are kept in the notebook."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"


def main() -> None:
    """Run all cells in a fresh kernel, in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebook")
    write = parser.parse_args().write
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QUICKSTART_FOLDER"] = folder
        client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # of the machine
            for output in cell.outputs:
                sys.stdout.write(output.get("text") or output["data"]["text/plain"] + "\n")
    if write:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
