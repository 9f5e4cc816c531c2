"""Memory and time of ich-predict: `memory` over folders of 1,000 and 20,000 files, `start` for one study."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ich_fastai.exports import View, write_view
from ich_fastai.head import draw_head, make_rng
from ich_fastai.tiny import tiny_run

SLICES = 20  # of a study
RUN = """
import resource, sys, time
start = time.perf_counter()
from ich_fastai.deliver import ich_predict
model, folder, out = sys.argv[1:]
ich_predict(model, [folder], out + "/out.csv", device="cpu", json=out + "/json")
MB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("measured", MB, time.perf_counter() - start)
"""


def make_folder(folder: Path, n_studies: int) -> None:
    "Studies of a synthetic head, a patient each."
    ids = {"PatientID": "P000000", "StudyInstanceUID": "2.25.9000000", "SeriesInstanceUID": "2.25.9000000.1"}
    write_view(folder / "one", draw_head(make_rng(5, 0)), [], View(n=SLICES, step=8.0, size=64), ids)
    slices = [path.read_bytes() for path in sorted((folder / "one").iterdir())]
    for k in range(1, n_studies):
        (folder / f"{k:06d}").mkdir()
        for i, data in enumerate(slices):
            own = data.replace(b"2.25.9000000", b"2.25.9%06d" % k).replace(b"P000000", b"P%06d" % k)
            (folder / f"{k:06d}" / f"{i:03d}").write_bytes(own)


def measure(n_files: int) -> tuple[float, float]:
    "Peak MB of the process, and seconds, of a folder of so many files."
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch, "in"), Path(scratch, "out")
        make_folder(folder, n_files // SLICES)
        command = [sys.executable, "-c", RUN, str(tiny_run() / "model"), str(folder), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{n_files:,} images, 0 not used" in done.stdout, done.stdout[-500:]
        _, mb, seconds = done.stdout.splitlines()[-1].split()
        return float(mb), float(seconds)


def compare_memory(few: int = 1_000, many: int = 20_000) -> None:
    "The peak over few and many files."
    (a, a_s), (b, b_s) = (measure(n) for n in (few, many))
    print(f"{few:,} files: {a:.0f} MB, {a_s:.0f} s; {many:,} files: {b:.0f} MB, {b_s:.0f} s")
    print(f"ratio {b / a:.3f}, {1024 * (b - a) / (many - few):.2f} kB more a file; {1e3 * b_s / many:.1f} ms a file")


def time_start(model: str, folder: str, repeats: int = 5) -> None:
    "Seconds from the command to the first answer, of imports alone, and of the model with its imports."
    load = f"import ich_fastai.deliver as d; d.load_model({model!r}, 'cpu')"
    with tempfile.TemporaryDirectory() as scratch:
        command = f"from ich_fastai.deliver import ich_predict as f; f({model!r}, [{folder!r}], {scratch + '/o.csv'!r})"
        for name, code in (("imports", "import ich_fastai.deliver"), ("and the model", load), ("all", command)):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start)
            print(f"{name}: {np.median(seconds):.1f} s, {min(seconds):.1f} to {max(seconds):.1f}")


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["memory"]
    {"memory": compare_memory, "start": time_start}[what](*map(int, rest) if what == "memory" else rest)
