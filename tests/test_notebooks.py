"""Every notebook runs alone, as a reader would run it."""

import multiprocessing
from functools import cache

import pytest
from conftest import PROJECT

NOTEBOOKS = sorted((PROJECT / "nbs").glob("*.ipynb"))


@cache
def warm_processes():
    "A source of fresh processes that have imported what most notebooks import: that takes half of a notebook's time."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nbdev.test", "matplotlib.pyplot", "seaborn", "ich_fastai.tiny", "ich_fastai.explain"]
    )
    return context


def run_notebook(path, answers):
    "Run in a process of its own; send whether all cells ran."
    from nbdev.test import test_nb

    answers.put(test_nb(path, skip_flags=["slow", "cuda"], basepath=PROJECT)[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_alone(path):
    context = warm_processes()
    answers = context.Queue()
    process = context.Process(target=run_notebook, args=(path, answers))
    process.start()
    assert answers.get(timeout=600), f"{path.name}: a cell failed; `nbdev-test {path}` shows it"
    process.join(60)
    assert process.exitcode == 0
