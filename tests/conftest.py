"""Fixtures that several test files share."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist keeps every core busy; more threads would only wait


def pytest_collection_modifyitems(items):
    "Tests of one file share fixtures, so they go to one worker; notebooks are free."
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    "Ctrl-C as a terminal gives it: a shell that runs the tests in the background makes it ignored."
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data():
    "The folder with real RSNA and CQ500 files; skips where it is absent."
    folder = Path(os.environ.get("ICH_REAL_DATA", PROJECT.parent / "shared" / "data"))
    if not (folder / "rsna").is_dir():
        pytest.skip(f"no real data: set ICH_REAL_DATA to a folder that holds rsna/ (looked at {folder.name}/)")
    return folder


@pytest.fixture(scope="session")
def command():
    "Run a console command of the project: command('ich-reproduce', '--preset', 'tiny') gives the finished process."

    def run(name, *arguments, timeout=900, **kwargs):
        path = PROJECT / ".venv" / "bin" / name
        program = str(path) if path.exists() else name
        return subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            **kwargs,
        )

    return run


@pytest.fixture(scope="session")
def tiny_run(command, tmp_path_factory):
    "A finished run of the tiny preset: the whole chain through papermill, on the phantom."
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    done = command("ich-reproduce", "--preset", "tiny", "--out", run_dir)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run_dir, done
