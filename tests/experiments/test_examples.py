"""The notebooks of examples/: stored without outputs, and they run."""

import json
import warnings

import pytest

import places

EXAMPLES = places.ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def cells(name):
    return json.loads((EXAMPLES / name).read_text())["cells"]


def test_there_are_two_notebooks():
    assert NOTEBOOKS == ["before_and_after.ipynb", "spectral_tour.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_without_outputs(name):
    """They would be megabytes in every change, and no one could tell if they are so."""
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_code_cell_is_narrated(name):
    """No more than four in a row without a word."""
    kinds = "".join(cell["cell_type"][0] for cell in cells(name))
    assert kinds.startswith("m") and kinds.endswith("m") and "ccccc" not in kinds


def run(name, folder):
    """Runs a notebook; gives what it printed, and how many pictures it showed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages, about each other
        import nbclient
        import nbformat

        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        nbclient.NotebookClient(
            notebook,
            timeout=240,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(x.text for x in outputs if x.output_type == "stream")
    return printed, sum("image/png" in x.get("data", {}) for x in outputs)


@pytest.mark.slow
def test_spectral_tour_finds_the_planted_defect(tmp_path):
    printed, pictures = run("spectral_tour.ipynb", tmp_path)
    assert "planted in block 5" in printed
    assert "A singular defect is forecast. It appears in block 5" in printed
    assert "7 defective tokens; AUC along nu 1.000" in printed
    assert pictures == 4


@pytest.mark.slow  # half a minute on a busy machine: it repairs a model
def test_before_and_after_shows_the_defect_gone(tmp_path):
    printed, pictures = run("before_and_after.ipynb", tmp_path)
    assert "A singular defect is forecast. It appears in block 5" in printed
    assert "No singular defect is forecast" in printed
    assert "before: 7 tokens detected, largest norm 16.0 times the median" in printed
    after = printed.split("after: ")[1]
    assert float(after.split("largest norm ")[1].split()[0]) < 2
    assert pictures == 5
