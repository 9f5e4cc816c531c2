"A warm Python (warm.py) ends as a plain one would, or the tests that use it would not see what fails."

import os
import subprocess
import time

import psutil
import pytest


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("os._exit(130)", 130, ""),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_it_ends_as_python_would(warm, tmp_path, end, code, said):
    script = "import os, sys\nprint(sys.argv[1:], os.environ['GIVEN'], os.getcwd(), sys.stdin.read(), flush=True)\n"
    (tmp_path / "script.py").write_text(script + end)
    how = {"cwd": tmp_path, "env": os.environ | {"GIVEN": "here"}, "input": "asked", "capture_output": True}
    done = subprocess.run([*warm, "script.py", "a", "b"], text=True, timeout=60, **how)
    assert done.stdout == f"['a', 'b'] here {tmp_path} asked\n"
    assert done.returncode == code and said in done.stderr and bool(said) == bool(done.stderr)


def test_it_ends_with_the_one_that_asked(warm, tmp_path):
    (tmp_path / "script.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    asked = subprocess.Popen([*warm, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True)
    pid = int(asked.stdout.readline())
    assert psutil.pid_exists(pid)
    asked.kill()
    asked.wait()
    until = time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
