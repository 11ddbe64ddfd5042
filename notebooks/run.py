"""Runs every notebook in a copy of this folder; the notebooks themselves stay without output.

python notebooks/run.py [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
# The second reads what the first has found.
ORDER = ("joint_search.ipynb", "reading_a_search.ipynb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the notebooks with their output")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "notebooks"
        shutil.copytree(HERE, place)
        shutil.copytree(HERE.parent / "examples", Path(folder) / "examples")
        for name in ORDER:
            notebook = nbformat.read(place / name, as_version=4)
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(place)}}).execute()
            print(f"{name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                nbformat.write(notebook, keep / name)


if __name__ == "__main__":
    main()
