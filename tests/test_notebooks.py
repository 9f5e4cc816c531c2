"""Every notebook runs alone, as a reader would run it."""

import pytest
from conftest import PROJECT

NOTEBOOKS = sorted((PROJECT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_alone(path, command):
    done = command("nbdev-test", path, cwd=PROJECT)
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
