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


def test_it_warns_as_python_would_and_draws_numbers_of_its_own(warm, tmp_path):
    script = """import random, sys, warnings
import numpy, torch
print(random.random(), numpy.random.rand(), torch.rand(1).item())
warnings.warn("here")
warnings.warn_explicit("in a library", DeprecationWarning, "library.py", 1)
print(sys.warnoptions)
"""
    (tmp_path / "script.py").write_text(script)
    how = {"capture_output": True, "text": True, "timeout": 60, "check": True}
    a, b = (subprocess.run([*warm, tmp_path / "script.py"], **how) for _ in range(2))
    (drawn, options), (others, _) = (done.stdout.splitlines() for done in (a, b))
    assert not set(drawn.split()) & set(others.split()) and options == "[]"
    assert "UserWarning: here" in a.stderr and "in a library" not in a.stderr


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
