"""Ingest under kills, bad input, full disks and other executors; the cache must not show any of it."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from dicom_files import HEAD, HOSTILE_SETS, make_dataset, make_file, plain_variants, to_bytes
from test_dicom import flip_bytes, gdcm_encode

from ich_fastai import cache as cache_module
from ich_fastai import ingest as module
from ich_fastai.cache import SHARD_ROWS, Cache, Decoder, read_row, save_settings, save_shard, shard_paths, write_shard
from ich_fastai.core import InputError, printable
from ich_fastai.cohort import build_cohort
from ich_fastai.ingest import count_errors, ingest, list_files
from ich_fastai.labels import LABELS
from ich_fastai.workers import Helper, hold_interrupt

N_FILES, SIZE = 4 * SHARD_ROWS + 100, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Five shards of small slices, one of them broken."
    path = tmp_path_factory.mktemp("many") / "dicom"
    path.mkdir()
    data = make_file(SOPInstanceUID="ID_00000000")
    for i in range(N_FILES):
        (path / f"ID_{i:08d}.dcm").write_bytes(data.replace(b"ID_00000000", f"ID_{i:08d}".encode()))
    (path / "ID_00000007.dcm").write_bytes(data[:-9])
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    "The run folder of an undisturbed ingest."
    run_dir = tmp_path_factory.mktemp("whole")
    ingest(folder, run_dir / "cache", SIZE, workers=1)
    return run_dir


def content(run_dir):
    "Every file of a run by name: its bytes."
    return {
        str(p.relative_to(run_dir)): p.read_bytes()
        for p in sorted(Path(run_dir).rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def run_command(folder, run_dir, *options, **kwargs):
    "`ich-ingest` as a process group of its own."
    program = Path(sys.executable).with_name("ich-ingest")
    arguments = [str(program), str(folder), str(run_dir), "--size", str(SIZE), *options]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs
    )


def test_the_number_of_workers_does_not_show(folder, whole, tmp_path):
    ingest(folder, tmp_path / "cache", SIZE, workers=2)
    assert content(tmp_path) == content(whole)
    names = set(content(whole))
    assert {"slices.parquet", "cache/cache.json", "cache/plan.parquet", "cache/shard-00004.npy"} <= names and len(
        names
    ) == 13


def test_rows_and_pixels_are_those_of_the_files(folder, whole):
    slices, cache = pd.read_parquet(whole / "slices.parquet"), Cache(whole / "cache")
    assert slices["file"].to_list() == sorted(p.name for p in folder.iterdir())
    assert count_errors(slices).to_dict() == {"truncated": 1}
    good = slices[slices["error"].isna()]
    assert (good["SOPInstanceUID"] == good["file"].str[:-4]).all()
    addresses = (good["shard"] * SHARD_ROWS + good["row"]).to_numpy("int64")
    assert len(set(addresses)) == N_FILES - 1
    picked = np.random.default_rng(0).permutation(len(good))[:6].reshape(2, 3)
    with Decoder() as decoder:
        want = [read_row(folder / good["file"].iloc[i], SIZE, decoder)[0] for i in picked.ravel()]
    np.testing.assert_array_equal(cache.gather(addresses[picked]).reshape(6, SIZE, SIZE), want)


def test_a_short_or_missing_shard_is_named(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    at = shard_paths(tmp_path / "cache", 0)[0]
    assert Cache(tmp_path / "cache").gather([0]).any()
    os.truncate(at, at.stat().st_size - 1)
    with pytest.raises(InputError, match="shard-00000.npy: shorter than its table says"):
        Cache(tmp_path / "cache").gather(list(range(N_FILES - 1)))
    at.unlink()
    with pytest.raises(InputError, match="shard-00000.npy: not there"):
        Cache(tmp_path / "cache").gather([[0]])


def test_more_shards_than_a_process_may_open(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    for number in range(1, 700):
        for first, path in zip(*(shard_paths(tmp_path / "cache", n) for n in (0, number)), strict=True):
            path.unlink(missing_ok=True)
            path.symlink_to(first)
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))\n"
    code += "from unittest.mock import patch\nfrom ich_fastai import cache as module\n"
    code += "every = [k * module.SHARD_ROWS for k in range(700)]\n"
    code += "with patch.object(module, 'read_run_file', wraps=module.read_run_file) as reads:\n"
    code += "    caches = [module.Cache(sys.argv[1]) for _ in range(2)]\n"
    code += "    train, valid, again = (cache.gather(every) for cache in [*caches, caches[0]])\n"
    code += "assert (train == valid).all() and (train == train[0]).all() and (train == again).all() and train.any()\n"
    code += "assert reads.call_count == 2 * 701  # cache.json, and each shard's table once\n"
    subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], check=True)


def test_threads_that_read_one_slice_at_once_agree(tmp_path):
    "The first that has read it forgets its checksum: it must not look changed to the others."
    save_settings(tmp_path, 256)
    save_shard(tmp_path, 0, 256, [(np.full((256, 256), k, np.int16), {"file": str(k)}) for k in range(20)])
    same = np.repeat(np.arange(20), 8)  # eight threads take every eighth: all read a slice at the same time
    for _ in range(100):
        assert (Cache(tmp_path).gather(same)[:, 0, 0] == same).all()


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_any_executor(folder, whole, tmp_path, executor):
    with executor(2) as pool:
        ingest(folder, tmp_path / "cache", SIZE, pool)
    assert content(tmp_path) == content(whole)


def wait_for_shards(cache_dir, process):
    "The shards that a process has half written, waited for until there are any or it has ended."
    before, half = set(cache_dir.glob(".*-shard-*.npy")), set()
    while not half and process.poll() is None:
        half = set(cache_dir.glob(".*-shard-*.npy")) - before
        time.sleep(0.005)
    return half


def test_killed_while_it_writes_shards(folder, whole, tmp_path):
    rng, ends = random.Random(1), []
    for workers in (1, 2, 2):
        process = run_command(folder, tmp_path, "--workers", str(workers))
        assert wait_for_shards(tmp_path / "cache", process)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ends.append(process.returncode)
    assert ends == [-signal.SIGKILL] * 3
    process = run_command(folder, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"files: {N_FILES:,}" in out and "1 x truncated" in out and "files/s" in err
    assert content(tmp_path) == content(whole)


def test_a_killed_parent_leaves_no_workers(folder, tmp_path):
    import psutil

    process = run_command(folder, tmp_path, "--workers", "2")
    children = []
    while len(children) < 2 and process.poll() is None:  # a worker and multiprocessing's resource tracker
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def die_once(marker, files, number, **options):
    "A shard writer that kills its process the first time it is called."
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return write_shard(files, number=number, **options)
    os.kill(os.getpid(), signal.SIGKILL)


def die_always(files, number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_are_survived(folder, whole, tmp_path):
    from functools import partial

    files = list(list_files(folder).values())
    todo = {n: files[n * SHARD_ROWS : (n + 1) * SHARD_ROWS] for n in range(5)}
    write, done = (
        partial(die_once, str(tmp_path / "died"), dicom_dir=str(folder), cache_dir=str(tmp_path), size=SIZE),
        [],
    )
    module.run_shards(todo, write, partial(ProcessPoolExecutor, 2), done.append)
    assert (tmp_path / "died").exists() and not todo and sum(map(len, done)) == N_FILES
    for n in range(5):
        for path in shard_paths(tmp_path, n):
            assert path.read_bytes() == (whole / "cache" / path.name).read_bytes()


def test_workers_that_always_die_stop_the_run():
    from functools import partial

    with pytest.raises(InputError, match="a.dcm: the workers, or their scheduler, died three times"):
        module.run_shards({0: ["a.dcm"], 1: ["b.dcm"]}, die_always, partial(ProcessPoolExecutor, 2), None)


def test_dask_workers_may_be_killed(folder, whole, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            workers = set(client.run(os.getpid).values())
            todo = ThreadPoolExecutor(1).submit(ingest, folder, tmp_path / "cache", SIZE, client.get_executor())
            while not (half := list((tmp_path / "cache").glob(".*-shard-*.npy"))) and not todo.done():
                time.sleep(0.005)
            victim = int(half[0].name[1:].partition("-")[0])  # the one that writes a shard
            assert victim in workers
            os.kill(victim, signal.SIGKILL)
            todo.result(60)
    assert content(tmp_path) == content(whole)


def test_a_dask_scheduler_that_is_gone_stops_the_run(folder, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        client = distributed.Client(cluster)
        executor = client.get_executor()
        client.close()
        with pytest.raises(InputError, match="their scheduler, died"):
            ingest(folder, tmp_path / "cache", SIZE, executor)


def stop_by_ctrl_c(folder, run_dir):
    "ich-ingest, stopped after it has begun: its process, and what it said."
    process = run_command(folder, run_dir, "--workers", "2")
    while not (run_dir / "cache" / "plan.parquet").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    return process, process.communicate(timeout=60)[1]


def test_a_run_stopped_by_ctrl_c_says_how_to_go_on(folder, whole, tmp_path):
    for attempt in range(3):  # on a busy machine it may have ended before
        process, err = stop_by_ctrl_c(folder, run_dir := tmp_path / str(attempt))
        if process.returncode:
            break
    assert process.returncode == 130 and "stopped; the same command goes on from here" in err and "Traceback" not in err
    ingest(folder, run_dir / "cache", SIZE)
    assert content(run_dir) == content(whole)


def test_ctrl_c_waits_until_the_pool_has_started(monkeypatch):
    steps = []
    with pytest.raises(KeyboardInterrupt), hold_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("the block ends")
    assert steps == ["the block ends"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", None)  # not called where Ctrl-C is ignored
    with hold_interrupt():
        pass


def test_files_added_later_are_appended(folder, tmp_path):
    some = tmp_path / "dicom"
    some.mkdir()
    for name in ("b.dcm", "d.dcm"):
        (some / name).write_bytes(make_file(SOPInstanceUID=f"ID_{name[0]}"))
    before = ingest(some, tmp_path / "cache", SIZE)
    (some / "a.dcm").write_bytes(make_file(SOPInstanceUID="ID_a"))
    after = ingest(some, tmp_path / "cache", SIZE)
    assert after["file"].to_list() == ["b.dcm", "d.dcm", "a.dcm"] and after["shard"].to_list() == [0, 0, 1]
    pd.testing.assert_frame_equal(after.head(2), before)


def test_changed_files_are_reported_and_read_again_on_request(tmp_path):
    some = tmp_path / "dicom"
    some.mkdir()
    (some / "a.dcm").write_bytes(make_file())
    (some / "b.dcm").write_bytes(make_file(SOPInstanceUID="ID_b"))
    before = ingest(some, tmp_path / "cache", SIZE)
    (some / "a.dcm").write_bytes(make_file(HEAD + 5))
    with pytest.raises(InputError, match=r"1 file has changed .*a\.dcm.*delete shard-00000\.parquet"):
        ingest(some, tmp_path / "cache", SIZE)
    (tmp_path / "cache" / "shard-00000.parquet").unlink()
    after = ingest(some, tmp_path / "cache", SIZE)
    assert after["modified_ns"][0] != before["modified_ns"][0] and after["error"].isna().all()


def test_what_is_gone_is_left_out_and_what_is_new_is_said(tmp_path, capsys):
    some, data = tmp_path / "dicom", {}
    some.mkdir()
    for name in "abcdef":  # patients 1 to 3, two files each
        data[name] = make_file(SOPInstanceUID=f"ID_{name}", PatientID=f"P{(ord(name) - 97) // 2}")
        (some / f"{name}.dcm").write_bytes(data[name])
    ingest(some, tmp_path / "cache", SIZE)
    capsys.readouterr()
    for name in "abc":
        (some / f"{name}.dcm").unlink()
    (some / "g.dcm").write_bytes(make_file(SOPInstanceUID="ID_g", PatientID="P9"))
    slices = ingest(some, tmp_path / "cache", SIZE)
    assert slices["file"].to_list() == ["d.dcm", "e.dcm", "f.dcm", "g.dcm"]
    said = "dicom: since the last ingest, files gone: 3 (patients: 1), files new: 1 (patients: 1)\n"
    assert capsys.readouterr().out == said
    labels = pd.DataFrame(0, index=pd.Index([f"ID_{n}" for n in "abcdefg"], name="SOPInstanceUID"), columns=LABELS)
    cohort = build_cohort(labels, slices, n_folds=2, min_brain_fraction=0)
    assert set(cohort["PatientID"]) == {"P1", "P2", "P9"}
    d, there = cohort[cohort["SOPInstanceUID"] == "ID_d"].iloc[0], set(cohort["address"])
    assert {d[n] for n in ("previous_2", "previous", "next", "next_2")} <= there, "no neighbor that is gone"
    (some / "a.dcm").write_bytes(data["a"])  # another time: it has changed
    with pytest.raises(InputError, match=r"1 file has changed .*a\.dcm"):
        ingest(some, tmp_path / "cache", SIZE)


def test_what_is_gone_before_it_was_read_is_forgotten(tmp_path):
    some = tmp_path / "dicom"
    some.mkdir()
    for name in "ab":
        (some / f"{name}.dcm").write_bytes(make_file(SOPInstanceUID=f"ID_{name}"))
    ingest(some, tmp_path / "cache", SIZE)
    (tmp_path / "cache" / "shard-00000.parquet").unlink()  # as if killed
    (some / "a.dcm").unlink()
    assert ingest(some, tmp_path / "cache", SIZE)["file"].to_list() == ["b.dcm"]
    (some / "a.dcm").write_bytes(make_file(SOPInstanceUID="ID_a"))
    assert ingest(some, tmp_path / "cache", SIZE)["file"].to_list() == ["b.dcm", "a.dcm"]


@pytest.mark.parametrize("missing", [{"SeriesInstanceUID": None}, {"SeriesInstanceUID": "", "StudyInstanceUID": None}])
def test_a_missing_series_joins_no_two_patients(tmp_path, missing):
    some = tmp_path / "dicom"
    some.mkdir()
    for i in range(6):
        tags = {"SOPInstanceUID": f"ID_{i}", "PatientID": f"P{i % 2}", "ImagePositionPatient": ["0", "0", str(i)]}
        (some / f"{i}.dcm").write_bytes(make_file(**tags, **missing))
    slices = ingest(some, tmp_path / "cache", SIZE)
    labels = pd.DataFrame(0, index=pd.Index([f"ID_{i}" for i in range(6)], name="SOPInstanceUID"), columns=LABELS)
    cohort = build_cohort(labels, slices, n_folds=2, min_brain_fraction=0)
    patient = cohort.set_index("address")["PatientID"]
    for name in ("previous_2", "previous", "next", "next_2"):
        assert (patient[cohort[name]].to_numpy() == cohort["PatientID"].to_numpy()).all()
    assert (cohort["next"] != cohort["address"]).sum() == 4, "a patient's own slices are neighbors"
    assert cohort.groupby("PatientID")["SeriesInstanceUID"].nunique().eq(1).all()


@pytest.mark.parametrize("named", HOSTILE_SETS)
def test_no_codec_of_python_reads_an_identifier(tmp_path, named):
    some, word = tmp_path / "dicom", r"P\ud800\x1b[31m\n" + "x" * 2000
    some.mkdir()
    (some / "good.dcm").write_bytes(make_file())
    ds = make_dataset(SOPInstanceUID="ID_bad", SpecificCharacterSet=named.split("\\"))
    ds.add_new("PatientID", "LO", word.encode() + b"\x1b\n")
    (some / "bad.dcm").write_bytes(to_bytes(ds))
    slices = ingest(some, tmp_path / "cache", SIZE).set_index("file")
    assert slices["error"].isna().all(), slices["error"]
    patient = slices.loc["bad.dcm", "PatientID"]
    assert len(patient) <= 256 and patient.isprintable() and patient.startswith(r"P\ud800\x1b[31m\n" + "x" * 50)
    assert ingest(some, tmp_path / "cache", SIZE)["error"].isna().all(), "and so at the next start"


def test_what_could_not_be_read_is_no_change_until_it_can_be(tmp_path):
    some = tmp_path / "dicom"
    (some / "folder.dcm").mkdir(parents=True)
    (some / "empty.dcm").touch()
    (some / "later.dcm").symlink_to(some / "missing")
    for i in range(5):
        (some / f"{i}.dcm").write_bytes(make_file(SOPInstanceUID=f"ID_{i}"))
        os.utime(some / f"{i}.dcm", ns=(1, 1_700_000_000_123_456_789 + i))  # more digits than a float has
    before = ingest(some, tmp_path / "cache", SIZE)
    assert before["modified_ns"].dropna().to_list() == [1_700_000_000_123_456_789 + i for i in range(5)]
    pd.testing.assert_frame_equal(ingest(some, tmp_path / "cache", SIZE), before)
    (some / "later.dcm").unlink()
    (some / "later.dcm").write_bytes(make_file(SOPInstanceUID="ID_later"))
    (some / "empty.dcm").write_bytes(make_file(SOPInstanceUID="ID_empty"))
    after = ingest(some, tmp_path / "cache", SIZE)  # what cannot be read is tried again, and its shard with it
    assert after.loc[after["error"].notna(), "file"].to_list() == ["folder.dcm"]
    (some / "folder.dcm").rmdir()
    (some / "folder.dcm").write_bytes(make_file(SOPInstanceUID="ID_folder"))
    with pytest.raises(InputError, match=r"1 file has changed .*folder\.dcm"):
        ingest(some, tmp_path / "cache", SIZE)


@pytest.mark.parametrize("name", ["plan.parquet", "cache.json"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"PAR1"])
def test_a_damaged_record_is_named(name, damage, tmp_path):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "a.dcm").write_bytes(make_file())
    ingest(tmp_path / "dicom", tmp_path / "cache", SIZE)
    (tmp_path / "cache" / name).write_bytes(damage)
    with pytest.raises(InputError, match=f"{name}.*damaged; delete "):
        ingest(tmp_path / "dicom", tmp_path / "cache", SIZE)


@pytest.mark.parametrize("damage", [b"", b"no table"])
@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_damaged_shard_is_written_again(tmp_path, suffix, damage):
    some = tmp_path / "dicom"
    some.mkdir()
    (some / "a.dcm").write_bytes(make_file())
    ingest(some, tmp_path / "run" / "cache", SIZE)
    want = content(tmp_path / "run")
    (tmp_path / "run" / "cache" / f"shard-00000.{suffix}").write_bytes(damage)
    ingest(some, tmp_path / "run" / "cache", SIZE)
    assert content(tmp_path / "run") == want


def test_a_run_folder_in_the_dicom_folder_is_refused(tmp_path):
    (tmp_path / "a.dcm").write_bytes(make_file())
    for run_dir in (tmp_path, tmp_path / "deep" / "run"):
        with pytest.raises(InputError, match="lies in the DICOM folder"):
            ingest(tmp_path, run_dir / "cache", SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.dcm"]


def test_a_zip_or_a_dicomdir_is_no_folder_of_slices(tmp_path):
    some = tmp_path / "dicom"
    some.mkdir()
    (some / "a.dcm").write_bytes(make_file())
    shutil.make_archive(str(tmp_path / "study"), "zip", some)
    (some / "DICOMDIR").write_bytes(make_file(SOPClassUID="1.2.840.10008.1.3.10", PixelData=None))
    for given in (tmp_path / "study.zip", some / "DICOMDIR"):
        with pytest.raises(
            InputError, match=f"{given.name}: Not a directory; give the folder that holds the .dcm files"
        ):
            ingest(given, tmp_path / "run" / "cache", SIZE)
    shutil.copy(tmp_path / "study.zip", some)
    slices = ingest(some, tmp_path / "run" / "cache", SIZE, max_error_share=1.0).set_index("file")
    assert slices["error"].notna().to_dict() == {"DICOMDIR": True, "a.dcm": False, "study.zip": True}
    assert slices.loc["study.zip", "error"].startswith("not a DICOM file")


def test_a_second_run_on_the_same_cache_stops(folder, tmp_path):
    from filelock import FileLock

    (tmp_path / "cache").mkdir()
    with FileLock(tmp_path / "cache" / ".lock"):
        process = run_command(folder, tmp_path)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "another command is writing there" in err and "Traceback" not in err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_says_so_and_leaves_no_half_shard(folder, whole, tmp_path, workers):
    import resource

    def limit():  # files of at most 500 kB: writes fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    process = run_command(folder, tmp_path, "--workers", str(workers), preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 1 and re.search(r"shard-0000\d\.npy: cannot be written", err) and "Traceback" not in err
    )
    left = {p.name for p in (tmp_path / "cache").iterdir() if p.name != ".lock"}
    assert (
        {"cache.json", "plan.parquet"}
        <= left
        <= {"cache.json", "plan.parquet", "shard-00004.npy", "shard-00004.parquet"}
    ), "the last shard is short"
    ingest(folder, tmp_path / "cache", SIZE, workers=1)
    assert content(tmp_path) == content(whole)


def test_no_space_left_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "a.dcm").write_bytes(make_file())
    monkeypatch.setattr(
        cache_module,
        "_write_header",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    )
    with pytest.raises(InputError, match=r"shard-00000\.npy: cannot be written \(No space left on device\)"):
        ingest(tmp_path / "dicom", tmp_path / "cache", SIZE)


def test_too_many_errors_stop_the_run_with_a_list(tmp_path):
    some = tmp_path / "dicom"
    some.mkdir()
    for i in range(60):
        (some / f"{i:02d}.dcm").write_bytes(make_file(SOPInstanceUID=f"ID_{i}") if i % 2 else b"no")
    with pytest.raises(InputError, match=r"errors\.csv: 30 files cannot be used, more than the 10 allowed"):
        ingest(some, tmp_path / "cache", SIZE)
    assert len(pd.read_csv(tmp_path / "errors.csv")) == 30
    slices = ingest(some, tmp_path / "cache", SIZE, max_error_share=0.5)
    assert slices["error"].isna().sum() == 30


def test_dry_run_writes_nothing(folder, tmp_path):
    process = run_command(folder, tmp_path / "run", "--dry-run")
    out, _ = process.communicate(timeout=60)
    megabytes = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    assert (
        process.returncode == 0
        and f"files: {N_FILES:,}, to read: {N_FILES:,} ({megabytes:,.0f} MB)" in out
        and "shards to write: 5" in out
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    for out, size in ((tmp_path / "file", SIZE), (folder / "run", SIZE), (tmp_path / "run", 0)):
        process = run_command(folder, out, "--dry-run", "--size", str(size))
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1 and len(error.splitlines()) == 1, "refused as the run itself would be"


def test_the_command_waits_for_no_heavy_import(command):
    done = command("ich-ingest", "--help")
    assert done.returncode == 0 and "scheduler" in done.stdout
    heavy = {"torch", "fastai", "pydicom", "distributed", "matplotlib"}
    code = f"import ich_fastai.ingest, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


GOOD = make_file(HEAD[:16, :16])
ROWS, PIXELS = GOOD.index(b"\x28\0\x10\0US"), GOOD.index(b"\xe0\x7f\x10\0OW")  # where these elements begin


def no_dicom_files():
    "Name: bytes that are no DICOM file, or begin as one; the start of the reason."
    rng = np.random.default_rng(3)
    return {
        "empty": (b"", "empty file"),
        "text": (b"It was a dark and stormy night. " * 20, "not a DICOM file"),
        "random": (rng.bytes(5000), "not a DICOM file"),
        "zeros": (bytes(5000), "not a DICOM file"),
        "png": (b"\x89PNG\r\n\x1a\n" + rng.bytes(500), "not a DICOM file"),
        "no preamble, cut": (GOOD[132:400], None),
        "only a preamble": (GOOD[:132], None),
        "random after the preamble": (GOOD[:132] + rng.bytes(3000), None),
        "random after the meta header": (GOOD[:300] + rng.bytes(3000), None),
    }


def make_directory():
    "A DICOMDIR."
    directory, record = make_dataset(HEAD[:16, :16], PixelData=None, Modality=None), pydicom.Dataset()
    record.DirectoryRecordType = "PATIENT"
    directory.DirectoryRecordSequence = pydicom.Sequence([record])
    return to_bytes(directory)


def broken_files():
    "Name: bytes of a file that is cut, or whose elements are not as they say; the start of the reason."
    cuts = (1, 100, 130, 140, 200, 300, 400, ROWS + 3, ROWS + 9, PIXELS + 4, PIXELS + 12, PIXELS + 100)
    return {f"cut at byte {n}": (GOOD[:n], None) for n in cuts} | {
        "dicomdir": (make_directory(), "not an image"),
        "no pixel data": (GOOD[:PIXELS], "no pixel data"),
        "pixel length too short": (GOOD[:PIXELS] + b"\xe0\x7f\x10\0OW\0\0\x10\0\0\0" + bytes(16), "truncated"),
        "pixel length too long": (GOOD[:PIXELS] + b"\xe0\x7f\x10\0OW\0\0\xf0\xff\xff\x0f" + bytes(500), "truncated"),
        "pixel length undefined": (GOOD[:PIXELS] + b"\xe0\x7f\x10\0OW\0\0\xff\xff\xff\xff" + bytes(512), None),
        "element length too long": (GOOD[: ROWS + 6] + b"\xff\xff" + GOOD[ROWS + 8 :], None),
        "unknown syntax": (GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"), None),
        "big endian in name only": (GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0"), None),
        "jpeg in name only": (GOOD.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4\0"), None),
        "deflated in name only": (GOOD.replace(b"1.2.840.10008.1.2.1\0\x02\0", b"1.2.840.10008.1.2.1.99"), None),
        "nested too deep": (GOOD[:PIXELS] + b"\x40\0\x75\xa7SQ\0\0\xff\xff\xff\xff" * 3000, None),
    }


def odd_headers():
    "Name: bytes of a whole file whose header says that it is no slice in HU; the start of the reason."
    rgb = dict(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, Rows=16, Columns=16)
    rgb |= dict(BitsAllocated=8, BitsStored=8, PixelData=bytes(16 * 16 * 3))
    return {
        "no rows": (make_file(Rows=None), "no such size"),
        "rows 0": (make_file(Rows=0), "no such size"),
        "absurd size": (make_file(Rows=65535, Columns=65535), "no such size"),
        "more rows than pixels": (make_file(Rows=2000), "truncated"),
        "no slope": (make_file(RescaleSlope=None), "no RescaleSlope"),
        "no intercept": (make_file(RescaleIntercept=None), "no RescaleIntercept"),
        "slope nan": (make_file(RescaleSlope="NaN"), "bad RescaleSlope"),
        "slope inf": (make_file(RescaleSlope="1e999"), "bad RescaleSlope"),
        "slope 0": (make_file(RescaleSlope="0"), "bad RescaleSlope"),
        "slope text": (make_file().replace(b"\x28\0\x53\x10DS\2\x001 ", b"\x28\0\x53\x10DS\2\0x "), "bad RescaleSlope"),
        "intercept nan": (make_file(RescaleIntercept="nan"), "bad RescaleIntercept"),
        "mr": (make_file(Modality="MR"), "not CT"),
        "no modality": (make_file(Modality=None), "not CT"),
        "multi-frame": (make_file(np.stack([HEAD] * 3), NumberOfFrames=3), "multi-frame"),
        "color": (make_file(**rgb), "not gray"),
        "palette": (make_file(PhotometricInterpretation="PALETTE COLOR"), "not gray"),
        "no bits": (make_file(BitsAllocated=None), "bad pixel format"),
        "17 bits of 16": (make_file(BitsStored=17, HighBit=16), "bad pixel format"),
        "16 bits that end at bit 11": (make_file(HighBit=11), "bad pixel format"),
        "iodine": (make_file(RescaleType="MGML"), "not in HU"),
        "no representation": (make_file(PixelRepresentation=None), "bad pixel format"),
        "no uid": (make_file(SOPInstanceUID=None), "no SOPInstanceUID"),
    }


def bad_files():
    "Name: bytes of a file that cannot be used, and the start of its reason."
    return no_dicom_files() | broken_files() | odd_headers()


def write_odd_entries(folder):
    "Entries that are no plain file of readable size. Name: the start of the reason."
    (folder / "a folder.dcm").mkdir()
    (folder / "loop.dcm").symlink_to(folder / "loop.dcm")
    (folder / "dangling.dcm").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.dcm")
    with open(folder / "huge.dcm", "wb") as f:
        f.truncate(10 << 30)  # sparse
    reasons = {"a folder": "not a file", "pipe": "not a file", "huge": "file too large"}
    reasons |= {"loop": "cannot be read: Too many", "dangling": "cannot be read: No such"}
    if os.geteuid() != 0:
        (folder / "secret.dcm").write_bytes(make_file())
        (folder / "secret.dcm").chmod(0)
        reasons["secret"] = "cannot be read: Permission"
    return reasons


def test_forty_kinds_of_bad_input(tmp_path):
    import psutil

    folder, bad, before = tmp_path / "dicom", bad_files(), psutil.Process().memory_info().rss
    folder.mkdir()
    for name, (data, _) in bad.items():
        (folder / f"{name}.dcm").write_bytes(data)
    others = write_odd_entries(folder)
    good = {
        name: data.replace(b"1.2.3\0\x08\0", b"9.%03d\0\x08\0" % i)
        for i, (name, data) in enumerate(plain_variants().items())
    }
    names = [*(f"good {name}" for name in good), "name with ünïcode 脑", os.fsdecode(b"not utf-8 \xff")]
    for i, name in enumerate(names):
        data = list(good.values())[i] if i < len(good) else make_file(SOPInstanceUID=f"ID_n{i}")
        (folder / f"{name}.dcm").write_bytes(data)
    (folder / "twice.dcm").write_bytes(make_file(SOPInstanceUID=f"ID_n{len(names) - 1}"))
    assert len(bad) + len(others) >= 40
    slices = ingest(folder, tmp_path / "cache", SIZE, max_error_share=1).set_index("file")["error"]
    assert psutil.Process().memory_info().rss < before + (1 << 30)
    assert len(slices) == len(list(folder.iterdir()))
    for name, reason in ({name: reason for name, (_, reason) in bad.items()} | others).items():
        assert pd.notna(slices[f"{name}.dcm"]), name
        assert reason is None or slices[f"{name}.dcm"].startswith(reason), (name, slices[f"{name}.dcm"])
    assert slices["twice.dcm"] == r"duplicate: same SOPInstanceUID as not utf-8 \xff.dcm"
    assert slices[[f"{printable(n)}.dcm" for n in names]].isna().all(), slices[
        slices.index.str.startswith("good")
    ].dropna()


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEG2000Lossless"])
def test_flipped_bytes_in_compressed_files_never_end_the_process(syntax, tmp_path):
    data, good = gdcm_encode(make_file(HEAD[:32, :32]), syntax, tmp_path), 0
    with Decoder() as decoder:
        for k, broken in enumerate(flip_bytes(data, 250, seed=4)):
            (tmp_path / "x.dcm").write_bytes(broken)
            pixels, row = read_row(tmp_path / "x.dcm", SIZE, decoder)
            assert (pixels is None) == (row["error"] is not None), k
            good += pixels is not None
    assert 0 < good < 250


def test_a_decoder_that_crashes_or_hangs_is_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "x.dcm"
    path.write_bytes(to_bytes(make_dataset(BitsAllocated=8, BitsStored=8, PixelData=HEAD.astype(np.uint8).tobytes())))
    with Decoder() as decoder:
        assert read_row(path, SIZE, decoder)[1]["error"] is None
        os.kill(decoder.process.pid, signal.SIGSEGV)
        assert read_row(path, SIZE, decoder)[1]["error"] == "cannot be decoded: the decoder crashed"
        assert read_row(path, SIZE, decoder)[1]["error"] is None, "a new one is started"
        os.kill(decoder.process.pid, signal.SIGSTOP)
        monkeypatch.setattr(cache_module, "DECODE_SECONDS", 0.2)
        assert "took more than" in read_row(path, SIZE, decoder)[1]["error"]


def never_start(self):
    raise OSError(errno.ENOMEM, "no memory for a process")


BAD_LUCK = {  # what happens to a good file's decoder, and what is said
    "killed": (lambda self: _start(self) or self.process.kill(), "was killed"),
    "too slow": (lambda self: _start(self) or os.kill(self.process.pid, signal.SIGSTOP), "took more than"),
    "no process": (never_start, "could not start"),
    "no start": (lambda self: setattr(self, "n_bytes", 1 << 20) or _start(self), "could not start|ran out of memory"),
}
_start = Helper._start


@pytest.mark.parametrize("what", BAD_LUCK)
def test_bad_luck_is_no_truth(tmp_path, monkeypatch, what):
    some = tmp_path / "dicom"
    some.mkdir()
    (some / "plain.dcm").write_bytes(make_file())
    eight = make_dataset(BitsAllocated=8, BitsStored=8, PixelData=HEAD.astype(np.uint8).tobytes(), SOPInstanceUID="2")
    (some / "helped.dcm").write_bytes(to_bytes(eight))
    with monkeypatch.context() as patch:
        patch.setattr(Helper, "_start", BAD_LUCK[what][0])
        patch.setattr(cache_module, "DECODE_SECONDS", 1 if what == "too slow" else 60)
        error = ingest(some, tmp_path / "cache", SIZE).set_index("file")["error"]
    assert error.isna().to_list() == [False, True]
    assert re.match(f"not decoded: the decoder ({BAD_LUCK[what][1]})", error["helped.dcm"]), error["helped.dcm"]
    assert ingest(some, tmp_path / "cache", SIZE)["error"].isna().all(), "tried again by the next ingest"


def test_a_crash_is_the_files_own_and_stays(tmp_path, monkeypatch):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "plain.dcm").write_bytes(make_file())
    data = to_bytes(make_dataset(BitsAllocated=8, BitsStored=8, PixelData=HEAD.astype(np.uint8).tobytes()))
    (tmp_path / "dicom" / "helped.dcm").write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(Helper, "_start", lambda self: _start(self) or os.kill(self.process.pid, signal.SIGSEGV))
        ingest(tmp_path / "dicom", tmp_path / "cache", SIZE)
    error = ingest(tmp_path / "dicom", tmp_path / "cache", SIZE)["error"]
    assert error[0] == "cannot be decoded: the decoder crashed"


def test_a_lower_limit_from_outside_is_kept():
    code = "import json, resource\nfrom ich_fastai.workers import Helper\n"
    code += "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    code += "with Helper(json.loads, 4 << 30) as helper: print(helper(b'[1]', 60))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1]\n", done.stderr
