"""What was tried against the commands, and what survived: kills, Ctrl-C, damage, hostile files.

python benchmarks/faults.py [PART ...] [--reproduce 20] [--ingest 40] [--hostile 240] [--until 08] [--seed 0]

Parts: reproduce, ingest (killed and Ctrl-C in turn, then run again: the same bytes), hostile (files that a command has
to read or name), damage (each file of a finished run, damaged; the table is that of tests/test_damage.py). All by
default. Exits with 1 if one did not hold.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "tests"))  # the hostile files and the table of damage are those of the tests

from ich_fastai.labels import find_dataset  # noqa: E402
from ich_fastai.tiny import tiny_phantom  # noqa: E402

LIMIT_S = 5.0  # after Ctrl-C


def start(name, *arguments):
    "A console command in a process group of its own, Ctrl-C as a terminal gives it; its words in one pipe."
    program = PROJECT / ".venv" / "bin" / name
    command = [str(program) if program.exists() else name, *map(str, arguments)]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **quiet
    )


def interrupt(process, after_s, with_signal):
    "Seconds until it was gone, None where it was faster, and its last words; the whole group gets the signal."
    try:
        return None, process.communicate(timeout=after_s)[0]
    except subprocess.TimeoutExpired:
        begun = time.perf_counter()
        os.killpg(process.pid, with_signal)
        try:
            said = process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
        return time.perf_counter() - begun, said


def content(folder):
    "Bytes by name, without what tells of time."
    kept = {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and ".lock" not in p.name}
    return {str(p.relative_to(folder)): data for p, data in kept.items() if p.suffix in (".parquet", ".npy", ".csv")}


def stopped_well(seconds, status, said, wanted):
    "Ctrl-C: within LIMIT_S, no traceback, status 130 and the words that say how to go on."
    up = status != -signal.SIGINT  # else Python had not begun, or had ended already: a shell calls that 130 too
    good = seconds <= LIMIT_S and "Traceback" not in said and not (up and (status != 130 or wanted not in said))
    if not good:
        print(f"  not well stopped after Ctrl-C: {seconds:.1f} s, status {status}, {said[-200:]!r}", flush=True)
    return good


def try_kills(n, rng, scratch, name, arguments, again):
    "Stop a command n times, at random moments, every second time by Ctrl-C; run it again; is all as undisturbed?"
    whole, begun = scratch / "whole", time.perf_counter()
    said = start(name, *arguments(whole)).communicate()[0]
    want, took, held, slowest = content(whole), time.perf_counter() - begun, 0, 0.0
    assert want, said[-500:]
    for k in range(n):
        out = scratch / f"stopped{k}"
        how = signal.SIGINT if k % 2 else signal.SIGKILL
        process = start(name, *arguments(out))
        seconds, said = interrupt(process, rng.uniform(0.3, took), how)  # from Python's own start on
        kept = (out / "manifest.json").exists()
        good = not (k % 2 and seconds) or stopped_well(seconds, process.returncode, said, again * kept or "stopped")
        slowest = max(slowest, seconds or 0.0) if k % 2 else slowest
        last = start(name, *arguments(out), *[again] * kept).communicate()[0]
        same = content(out) == want
        held += same and good
        if not same:
            print(f"  {name}: other bytes after stop {k}: {last[-300:]!r}", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        print(f"  {k + 1} of {n}, {held} held", flush=True)
    print(
        f"{name}: tried {n} (Ctrl-C {n // 2}, kill {n - n // 2}), survived {held}; Ctrl-C took {slowest:.1f} s at most"
    )
    return held == n


def try_reproduce(options, rng, scratch):
    data = tiny_phantom()
    arguments = lambda out: ("--preset", "tiny", "--data", data, "--out", out, "--until", options.until)  # noqa: E731
    return try_kills(options.reproduce, rng, scratch, "ich-reproduce", arguments, "--resume")


def try_ingest(options, rng, scratch):
    many = scratch / "many"
    many.mkdir()
    for path in find_dataset(tiny_phantom()).dicom_dir.glob("*.dcm"):
        for k in range(10):
            os.link(path, many / f"{k:02d}{path.name}")
    arguments = lambda out: (many, out, "--max-error-share", "1")  # noqa: E731
    return try_kills(options.ingest, rng, scratch, "ich-ingest", arguments, "")


def hostile_files(n):
    "Name: bytes. Bad files of every kind, every encoding, and copies with flipped bytes up to n."
    from dicom_files import HEAD, make_file, plain_variants
    from test_dicom import flip_bytes
    from test_ingest import bad_files

    files = {f"bad {name}": data for name, (data, _) in bad_files().items()}
    files |= {f"good {name}": data for name, data in plain_variants().items()}
    small = make_file(HEAD[:16, :16])
    files |= {f"cut {k}": small[: k * len(small) // 40] for k in range(40)}
    flips = flip_bytes(small, max(0, n - len(files)), seed=5)
    return files | {f"flipped {k}": data for k, data in enumerate(flips)}


def try_hostile(options, rng, scratch):
    "Each file is a row, with pixels or with a reason."
    files, folder = hostile_files(options.hostile), scratch / "hostile"
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.dcm").write_bytes(data)
    process = start("ich-ingest", folder, scratch / "run", "--max-error-share", "1")
    said = process.communicate()[0]
    held = 0
    if process.returncode == 0 and "Traceback" not in said:
        rows = pd.read_parquet(scratch / "run" / "slices.parquet").set_index("file")
        for name in files:
            error = rows["error"].get(f"{name}.dcm", "")
            read = error is None or pd.isna(error)
            fine = not (read and name.startswith("bad ")) and (read or (bool(error) and error.isprintable()))
            held += fine
            if not fine:
                print(f"  hostile: {name}: {error!r}")
    else:
        print(said[-500:])
    print(f"hostile files: tried {len(files)}, survived {held}")
    return held == len(files)


def try_damage(options, rng, scratch):
    "The cases of tests/test_damage.py: file of a run x kind of damage; a test holds all kinds of one reader."
    tests = PROJECT / "tests" / "test_damage.py"
    if not tests.is_file():
        print("damage: not tried, there is no tests/test_damage.py")
        return False
    cases = importlib.import_module("test_damage").CASES
    kinds = len({kind for *_, kind in cases})
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rfE", str(tests)]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout
    broken = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(*(f"  damage: {line[:150]}" for line in broken), sep="\n")
    print(f"damage: tried {len(cases)}, survived {max(0, len(cases) - kinds * len(broken))}")
    return not broken and " passed" in said


PARTS = {"reproduce": try_reproduce, "ingest": try_ingest, "hostile": try_hostile, "damage": try_damage}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    for name, n in {"reproduce": 20, "ingest": 40, "hostile": 240, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=n)
    parser.add_argument("--until", default="08", help="last notebook of the runs that are stopped")
    options, held = parser.parse_args(), {}
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            held[part] = PARTS[part](options, random.Random(options.seed), Path(scratch))
    print(json.dumps(held))
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
