"""Executes the notebooks as they are, in a folder that is given, and fails where a cell does.

python notebooks/run.py FOLDER
"""

import pathlib
import sys

import nbclient
import nbformat


def main(folder: str):
  workdir = pathlib.Path(folder)
  workdir.mkdir(parents=True, exist_ok=True)
  for path in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workdir)}}).execute()
    nbformat.write(notebook, workdir / path.name)
    outputs = sum(len(cell.get("outputs", ())) for cell in notebook.cells)
    print(f"{path.name}: {len(notebook.cells)} cells, {outputs} outputs, written to {workdir / path.name}")


if __name__ == "__main__":
  main(sys.argv[1])
