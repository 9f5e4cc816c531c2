"""Ingest against the fastai recipe and against only reading the bytes: speed, workers, memory, start-up, kills.

python benchmarks/ingest.py [SECTION ...] [--files 2000] [--data DICOM_FOLDER]

Sections: speed workers memory listing kills (all by default). Without --data the slices are copies of the tiny
phantom's. Ratios are of medians.
The fastai recipe needs what fastai does not install by itself: pip install kornia scikit-image.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil

from ich_fastai.ingest import Job, ingest, open_job, save_plan
from ich_fastai.labels import find_dataset
from ich_fastai.tiny import tiny_phantom

SECTIONS = ("speed", "workers", "memory", "listing", "kills")


def copy_slices(source, target, n):
    "A folder of `n` readable slices of 512 x 512 px, as most of RSNA's are, with own identifiers, copied from a few."
    target.mkdir()
    originals = [p for p in sorted(Path(source).glob("*.dcm")) if 512 * 1024 < p.stat().st_size < 530 * 1024]
    for i in range(n):
        path = originals[i % len(originals)]
        uid = f"ID_{i:09x}"
        (target / f"{uid}.dcm").write_bytes(path.read_bytes().replace(path.stem.encode(), uid.encode()))
    return target


def link_slices(paths, target, times):
    "A folder in which each slice is there so many times: hard links, so that all of it stays in memory."
    target.mkdir()
    for path in paths:
        for k in range(times):
            os.link(path, target / f"{k:02d}{path.name}")
    return target


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def read_bytes(paths):
    "Only read: what nothing that looks at every byte can beat."
    for path in paths:
        with open(path, "rb") as f:
            f.read()


def fastai_recipe(paths, out):
    "What the fastai notebooks do: a header table with pixel statistics, then a resized picture of each file."
    import pandas as pd
    import torch
    import torch.nn.functional as F
    from fastai.basics import L
    from fastai.medical.imaging import dcmread  # noqa: F401  patches from_dicoms, scaled_px and save_tif16

    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore"):
        table = pd.DataFrame.from_dicoms(L(paths), px_summ=True, n_workers=0)
        for path in paths:
            px = path.dcmread().scaled_px
            F.interpolate(px[None, None].float(), (256, 256), mode="area")[0, 0].save_tif16(out / f"{path.stem}.tif")
    return table


def measure_speed(folder, scratch):
    paths = sorted(folder.glob("*.dcm"))
    few = paths[:200]  # the recipe is slow
    seconds = {"read": [], "ingest": [], "fastai": []}
    (scratch / "tif").mkdir()
    read_bytes(paths)
    for turn in range(5):
        seconds["read"].append(timed(read_bytes, paths) / len(paths))
        seconds["ingest"].append(timed(ingest, folder, scratch / f"speed{turn}" / "cache", workers=1) / len(paths))
        shutil.rmtree(scratch / f"speed{turn}")
        if turn < 3:
            seconds["fastai"].append(timed(fastai_recipe, few, scratch / "tif") / len(few))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:>8}: {1 / value:8,.0f} files/s, one core")
    print(f"ingest is {median['fastai'] / median['ingest']:.1f} times the fastai recipe (claim: 40 or more)")
    print(f"ingest takes {median['ingest'] / median['read']:.2f} times as long as reading the bytes (claim: 3 or less)")


def measure_workers(folder, scratch, times=40):
    seconds, many = (
        {1: [], 2: []},
        link_slices(sorted(folder.glob("*.dcm")), scratch / "many", times),
    )  # enough that starting a process does not count
    for turn in range(3):
        for workers in seconds:
            seconds[workers].append(
                timed(ingest, many, scratch / f"workers{turn}{workers}" / "cache", workers=workers, max_error_share=1)
            )
            shutil.rmtree(scratch / f"workers{turn}{workers}")
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    n = len(os.listdir(many))
    print(
        f"{n:,} files: 1 worker {one:.2f} s, 2 workers {two:.2f} s: {one / two:.2f} times as fast (claim: 1.7 or more)"
    )
    shutil.rmtree(many)


def high_water(pid):
    "MB: the largest resident size of a process so far."
    try:
        with open(f"/proc/{pid}/status") as f:
            return next((int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM")), 0)
    except OSError:  # it has ended
        return 0


def peak_memory(folder, out):
    "MB: the largest resident sizes of the parent and of any of its children, while two workers ingest `folder`."
    process = start_ingest(folder, out, "--workers", "2")
    parent, child = psutil.Process(process.pid), 0
    peak = 0
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        with contextlib.suppress(psutil.Error):
            child = max([child, *(high_water(p.pid) for p in parent.children(recursive=True))])
        time.sleep(0.02)
    shutil.rmtree(out)
    return peak, child


def measure_memory(folder, scratch):
    peaks = {}
    for times in (1, 10):
        n = times * len(os.listdir(folder))
        many = copy_slices(folder, scratch / f"memory{times}", n)
        peaks[n] = peak_memory(many, scratch / f"out{times}")
        print(f"{n:>6,} files: parent {peaks[n][0]:.0f} MB, largest worker {peaks[n][1]:.0f} MB (claim: under 700)")
        shutil.rmtree(many)
    few, many = peaks.values()
    print(f"growth of the largest process {max(many) / max(few) - 1:+.1%} (claim: 10% or less)")


def measure_listing(folder, scratch, n=700_000):
    many = scratch / "listing"
    many.mkdir()
    for i in range(n):
        os.close(os.open(many / f"ID_{i:09x}.dcm", os.O_CREAT))

    def start_up():
        cache = scratch / "listing_cache"
        job = Job(many, cache, 256)
        open_job(job)
        save_plan(job)

    print(f"start-up with {n:,} directory entries: {timed(start_up):.1f} s (claim: under 20)")


def content(run_dir):
    return {
        str(p.relative_to(run_dir)): p.read_bytes()
        for p in sorted(run_dir.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def start_ingest(folder, out, *options):
    program = Path(sys.executable).with_name("ich-ingest")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return subprocess.Popen([str(program), str(folder), str(out), "--max-error-share", "1", *options], **quiet)


def measure_kills(folder, scratch, n=20):
    "SIGKILL the run at random moments, or a Dask worker under it; in the end the cache must be the undisturbed one."
    folder = link_slices(sorted(folder.glob("*.dcm")), scratch / "killed", 3)  # enough shards for a local pool
    ingest(folder, scratch / "whole" / "cache", workers=1)
    want, seconds = content(scratch / "whole"), timed(ingest, folder, scratch / "again" / "cache", workers=1)
    for what, kill in (("the run", kill_run), ("Dask workers, and in half of the cases the run too,", kill_worker)):
        rng, same = random.Random(0), 0
        for k in range(n):
            kill(folder, out := scratch / f"{kill.__name__}{k}", k, seconds, rng)
            start_ingest(folder, out).wait()
            same += content(out) == want
            shutil.rmtree(out)
        print(f"{what} killed at {n} random moments: {same} of {n} caches equal the undisturbed one")


def kill_run(folder, out, k, seconds, rng):
    "Kill an ingest at a random moment."
    process = start_ingest(folder, out, "--workers", str(1 + k % 2))
    time.sleep(rng.uniform(0.3, 1 + seconds))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_worker(folder, out, k, seconds, rng):
    "Kill a Dask worker at a random moment, every second time the ingest as well: Dask does not always replace one."
    import distributed

    local = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL")
    with distributed.LocalCluster(**local) as cluster, distributed.Client(cluster) as client:
        process = start_ingest(folder, out, "--scheduler", cluster.scheduler_address)
        time.sleep(rng.uniform(1, 2 + seconds))
        victims = [p for p in client.run(os.getpid).values() if psutil.pid_exists(p)]
        os.kill(rng.choice(victims), signal.SIGKILL)
        if k % 2:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=[], choices=[*SECTIONS, []])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--data", default="")
    options = parser.parse_args()
    source = options.data or find_dataset(tiny_phantom()).dicom_dir
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        folder = copy_slices(source, scratch / "dicom", options.files)
        for section in options.sections or SECTIONS:
            print(f"## {section}, {options.files:,} files", flush=True)
            globals()[f"measure_{section}"](folder, scratch)


if __name__ == "__main__":
    main()
