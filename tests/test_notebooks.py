"""Every notebook runs alone, as a reader would run it."""

import shutil
import subprocess
import sysconfig

from conftest import PROJECT


def test_every_notebook_runs_alone():
    program = shutil.which("nbdev-test", path=sysconfig.get_path("scripts")) or "nbdev-test"
    done = subprocess.run(
        [program, "--n-workers", "2", "--timing", "--do-print"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(done.stdout[-6000:], done.stderr[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
