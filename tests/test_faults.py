"Careless commands: parameters out of their range, two commands at once, Ctrl-C, a kernel that dies, a folder `dl`."

import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from numbers import Integral, Real

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT
from dicom_files import make_file
from fastcore.script import anno_parser
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dicom import gdcm_encode

from ich_fastai import commands
from ich_fastai.arms import train_arms
from ich_fastai.batches import Settings, named_windows
from ich_fastai.cohort import make_cohort
from ich_fastai.controls import controls
from ich_fastai.core import InputError, save_json
from ich_fastai.datasets import open_dataset
from ich_fastai.dicom import read_slice
from ich_fastai.deliver import ich_predict
from ich_fastai.evaluate import evaluate
from ich_fastai.explain import explain
from ich_fastai.adopt import adopt
from ich_fastai.guard import LISTS, RANGES, check_ranges, hold_folder, make_scratch
from ich_fastai.imbalance import compare
from ich_fastai.ingest import ingest
from ich_fastai.labels import find_dataset, undersample
from ich_fastai.phantom import make_phantom
from ich_fastai.recurrent import add_network
from ich_fastai.reproduce import PHANTOM_PARAMETERS, STAGES, check_network, check_parameters, declared_parameters
from ich_fastai.reproduce import parse_settings, prepare_run, reproduce, run_notebook
from ich_fastai.sequence import read_together
from ich_fastai.tiny import tiny_phantom
from ich_fastai.train import fit

DECLARED = {stage: declared_parameters(stage) for stage in STAGES} | {"make_phantom": PHANTOM_PARAMETERS}
FREE = {"data_dir", "run_dir", "labels_csv", "arch", "pretrained_from", "slices_per_series"}  # checked by their owners
quick = settings(derandomize=True, deadline=None, database=None, max_examples=100)

NAMES = st.sampled_from(sorted(RANGES))
DEEP = [[]]
for _ in range(3000):
    DEEP = [DEEP]
ODD = [
    None,
    True,
    False,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**5000,
    -(10**5000),
    DEEP,
    {},
    "",
    "\n",
    "\x1b[2J",
]
SCALARS = st.integers() | st.floats() | st.text(max_size=20) | st.booleans() | st.binary(max_size=4) | st.none()
ANYTHING = st.sampled_from(ODD) | st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x)
)


def within(name, value):
    "Is it in the range? Written anew, so that it can differ from what is tested."
    low, *_, high = RANGES[name]
    if name in LISTS:
        members = value if isinstance(value, list | tuple) else []
        return bool(members) and all(within_one(low, high, name, v) for v in members) and not repeats(members)
    return within_one(low, high, name, value)


def within_one(low, high, name, value):
    if isinstance(low, str):
        return isinstance(value, str) and value in RANGES[name]
    kind = Integral if type(low) is type(high) is int else Real
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def repeats(members):
    return any(a == b for i, a in enumerate(members) for b in members[:i])


def good_values(name):
    "Values in the range of a parameter, its ends often among them."
    low, *_, high = RANGES[name]
    one = st.sampled_from(RANGES[name]) if isinstance(low, str) else st.integers(low, high)
    one = st.floats(low, high) if isinstance(low, float) else one
    return st.lists(one, min_size=1, max_size=3, unique=True) if name in LISTS else one


def is_one_line(error, name):
    "Does the message name the parameter, in one line without control characters?"
    text = str(error)
    return name in text and len(text) < 500 and text.isprintable()


def test_each_parameter_of_each_stage_has_a_range():
    names = {name for parameters in DECLARED.values() for name in parameters}
    assert names - set(RANGES) == FREE and set(RANGES) - names == {"size"}


@quick
@given(st.data())
def test_what_is_in_its_range_passes_everywhere(data):
    name = data.draw(NAMES.filter(lambda n: n != "size"))
    value = data.draw(good_values(name))
    assert within(name, value)
    assert check_parameters({name: value}, DECLARED) == {name: value}
    if name == "windows":
        value = named_windows(value)
    if name in Settings.__dataclass_fields__:
        assert getattr(Settings(**{name: value}), name) == value


@quick
@given(NAMES, ANYTHING)
def test_what_is_out_of_it_is_one_line_that_names_the_range(name, value):
    try:
        check_ranges(**{name: value})
    except InputError as e:
        assert not within(name, value) and is_one_line(e, name)
        assert "must be" in str(e) and str(RANGES[name][0]) in str(e) and str(RANGES[name][-1]) in str(e)
    else:
        assert within(name, value)


@quick
@given(st.sampled_from(sorted(FREE | set(RANGES))), ANYTHING)
def test_the_runner_gives_a_value_in_range_or_one_line(name, value):
    try:
        params = check_parameters({name: value}, DECLARED)
    except InputError as e:
        assert is_one_line(e, name)
    else:
        assert name not in RANGES or within(name, params[name])


@quick
@given(
    st.sampled_from(sorted(RANGES)), st.text(max_size=30) | st.from_regex(r"[\[\]{}0-9.,:e+\-~ ]{1,20}", fullmatch=True)
)
def test_any_text_after_set_is_a_value_or_one_line(name, text):
    try:
        check_parameters(parse_settings([f"{name}={text}"]), DECLARED)
    except InputError as e:
        assert str(e).isprintable() and len(str(e)) < 500


STAGE_CALLS = {  # each stage from Python, on a folder that is not there: a wrong value is known before that
    "undersample": (undersample, {"labels": None}),
    "make_phantom": (make_phantom, {"out_dir": "nowhere"}),
    "ingest": (ingest, {"dicom_dir": "nowhere", "cache_dir": "nowhere/cache"}),
    "make_cohort": (make_cohort, {"run_dir": "nowhere"}),
    "fit": (fit, {"run_dir": "nowhere", "settings": Settings()}),
    "read_together": (read_together, {"run_dir": "nowhere"}),
    "add_network": (add_network, {"run_dir": "nowhere"}),
    "train_arms": (train_arms, {"run_dir": "nowhere", "arms": ["none+none"]}),
    "evaluate": (evaluate, {"run_dir": "nowhere"}),
    "controls": (controls, {"run_dir": "nowhere"}),
    "explain": (explain, {"run_dir": "nowhere"}),
    "compare": (compare, {"run_dir": "nowhere"}),
    "adopt": (adopt, {"dataset": None, "run_dir": "nowhere"}),
    "Settings": (Settings, {}),
}
ALIAS = {("train_arms", "epochs"): "arm_epochs", ("train_arms", "epoch_size"): "arm_epoch_size"}
PAIRS = [
    (stage, name)
    for stage, (function, _) in STAGE_CALLS.items()
    for name in inspect.signature(function).parameters
    if name in RANGES and (stage, name) != ("Settings", "windows")
]


@settings(quick, max_examples=200)
@given(st.sampled_from(PAIRS), ANYTHING)
def test_each_stage_called_from_python_names_the_parameter_first(pair, value):
    name, (function, rest) = pair[1], STAGE_CALLS[pair[0]]
    real = ALIAS.get(pair, name)
    if within(real, value) or (value is None and inspect.signature(function).parameters[name].default is None):
        return
    with pytest.raises(InputError) as error:
        function(**{**rest, name: value})
    assert is_one_line(error.value, name) and f"{real}=" in str(error.value)


@quick
@given(ANYTHING | st.dictionaries(st.text(max_size=5), st.tuples(SCALARS, SCALARS), max_size=2))
def test_windows_of_settings_are_numbers_or_one_line(value):
    try:
        made = Settings(windows=value)
    except InputError as e:
        assert is_one_line(e, "windows")
    else:
        assert made.windows and all(np.isfinite([c, w]).all() and w > 0 for c, w in made.windows.values())


@pytest.mark.parametrize(
    "slices", [[9, 3], [5], [5, 5, 5], [4, 9], [5, 201], [5.0, 6], ["a", "b"], [True, 9], 7, [[5], 6]]
)
def test_slices_per_series_are_two_numbers(tmp_path, slices):
    with pytest.raises(InputError) as error:
        make_phantom(tmp_path / "p", 1, slices_per_series=slices)
    assert is_one_line(error.value, "slices_per_series") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"arch": "levit_128s", "image_size": 100}, "does not work at image_size=100"),
        ({"arch": "resnet1"}, "timm has no such model"),
        ({"pretrained_from": "nowhere.pth"}, "pretrained_from=nowhere.pth: no such file"),
    ],
)
def test_a_network_that_cannot_be_built_is_known_first(wrong, message):
    with pytest.raises(InputError, match=message) as error:
        check_network(wrong, DECLARED["12_train"])
    assert str(error.value).isprintable()


def program(name):
    path = PROJECT / ".venv" / "bin" / name
    return str(path) if path.exists() else name


def test_two_commands_on_one_folder_are_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    with hold_folder(tmp_path / "run"), pytest.raises(InputError, match="run: another command is writing there"):
        reproduce("tiny", out=tmp_path / "run")
    with hold_folder(tmp_path / ".made.part"), hold_folder(tmp_path / "pages"):
        done = command("ich-phantom", tmp_path / "made", "--n-patients", "1")
        for folders in ({"html": str(tmp_path / "pages")}, {"json": str(tmp_path / "pages")}):
            with pytest.raises(InputError, match="pages: another command is writing there"):
                ich_predict("nowhere", ["nowhere"], str(tmp_path / "out.csv"), **folders)
    with hold_folder(tmp_path, lock_name=".out.csv.lock"):
        with pytest.raises(InputError, match="out.csv: another command is writing there"):
            ich_predict("nowhere", ["nowhere"], str(tmp_path / "out.csv"))
    assert done.returncode == 1 and "made: another command is writing there" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "made").exists()


def test_two_phantoms_at_once_do_not_mix(tmp_path):
    call = [program("ich-phantom"), str(tmp_path / "p"), "--n-patients", "1", "--workers", "1", "--seed"]
    quiet = dict(cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([*call, seed], **quiet) for seed in ("1", "2")]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1] and "Traceback" not in "".join(said)
    assert re.search(r"another command is writing there|holds something else", said[codes.index(1)])
    about = json.loads((tmp_path / "p" / "phantom.json").read_text())
    assert about["seed"] == 1 + codes.index(0)
    assert about["counts"]["slices"] == len(list((tmp_path / "p" / "stage_1_train_images").iterdir()))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def children_of(pid):
    import psutil

    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


@pytest.mark.parametrize("wait_for", ["notebooks/01_labels.ipynb", ".lock"])
def test_ctrl_c_ends_a_run_and_all_that_it_started_with_a_line(tmp_path, wait_for):
    call = [
        program("ich-reproduce"),
        "--preset",
        "tiny",
        "--data",
        tiny_phantom(),
        "--out",
        tmp_path / "run",
        "--until",
        "08",
    ]
    process = subprocess.Popen(list(map(str, call)), cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (begun := (tmp_path / "run" / wait_for).exists()) and time.monotonic() < until:
        time.sleep(0.05)
    assert begun
    started = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().startswith(f"{tmp_path / 'run'}: stopped; run the same command again") and "--resume" in said
    assert len(said.strip().splitlines()) == 1 and not [p for p in started if p.is_running() and p.status() != "zombie"]


def test_a_kernel_that_dies_is_one_line(tmp_path):
    cell = nbformat.v4.new_code_cell("import os\nos.kill(os.getpid(), 9)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "12_train.ipynb")
    with pytest.raises(InputError, match="12_train: its kernel died .out of memory.*--resume") as error:
        run_notebook(tmp_path / "12_train.ipynb", tmp_path / "out.ipynb", {})
    assert "\n" not in str(error.value)


READ_ALL = """
import hashlib, sys
from ich_fastai import dicom, exports, images, scan, series
from ich_fastai.dicom import read_slice
print(*(hashlib.sha256(read_slice(path)[0].tobytes()).hexdigest() for path in sys.argv[1:]))
"""


def test_a_folder_named_dl_breaks_no_import(tmp_path):
    files = []
    for syntax in ("JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"):
        (tmp_path / f"{syntax}.dcm").write_bytes(gdcm_encode(make_file(), syntax, tmp_path))
        files.append(str(tmp_path / f"{syntax}.dcm"))
    (tmp_path / "dl").mkdir()
    (tmp_path / "dl" / "__init__.py").write_text("raise RuntimeError('imported')")
    there = {**os.environ, "PYTHONPATH": str(PROJECT)}
    call = [sys.executable, "-W", "ignore", "-c", READ_ALL, *files]
    said = subprocess.run(call, cwd=tmp_path, env=there, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == [hashlib.sha256(read_slice(path)[0].tobytes()).hexdigest() for path in files]


def run_python(code, *arguments, **there):
    "Python with the package, and what the environment adds."
    there = {**os.environ, "PYTHONPATH": str(PROJECT)} | there
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)


COMMANDS = [name for name in vars(commands) if name.startswith("ich_")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_without_the_module_is_the_modules_own(name):
    module, function = getattr(commands, name).args
    real = inspect.unwrap(getattr(importlib.import_module(f"ich_fastai.{module}"), function))
    assert anno_parser(commands.read_signature(module, name)).format_help() == anno_parser(real).format_help()
    script = f"{name.replace('_', '-')}=ich_fastai.commands:{name}"
    assert script in (PROJECT / "settings.ini").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["fastcore", "numpy", "torch"])
def test_ctrl_c_while_python_imports_is_one_line(tmp_path, module, number):
    (tmp_path / f"{module}.py").write_text(f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(60)")
    code = "from ich_fastai.commands import ich_predict; ich_predict()"
    done = run_python(code, "nowhere", "nothing", PYTHONPATH=f"{tmp_path}{os.pathsep}{PROJECT}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_command_is_its_own_line_and_130(tmp_path, number):
    code = f"""import signal, ich_fastai.ingest as room; from ich_fastai.commands import ich_ingest
room.ingest = lambda *_, **__: signal.raise_signal({number})
ich_ingest()"""
    done = run_python(code, tmp_path, "out")
    assert (done.returncode, done.stderr) == (130, "out/cache: stopped; the same command goes on from here\n")


def test_what_a_killed_command_had_unpacked_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """import os, sys; from ich_fastai.guard import make_scratch
with make_scratch() as folder:
    (folder / "a patient").touch()
    os.kill(os.getpid(), int(sys.argv[1]))"""
    with make_scratch() as held:
        run_python(code, signal.SIGKILL, TMPDIR=str(tmp_path))
        assert len(list(tmp_path.glob("ich-scratch-*/a patient"))) == 1
        assert run_python(code, 0, TMPDIR=str(tmp_path)).returncode == 0
        assert list(tmp_path.glob("ich-scratch-*/")) == [held], "one that is in use stays"
    assert not list(tmp_path.iterdir())


def test_trouble_with_the_temporary_folder_is_no_reason_of_a_study(tmp_path, monkeypatch):
    (tmp_path / "study").mkdir()
    shutil.copy(next(find_dataset(tiny_phantom()).dicom_dir.iterdir()), tmp_path / "study")
    pd.DataFrame({"folder": ["study"], "any": [0]}).to_csv(tmp_path / "labels.csv", index=False)
    dataset = open_dataset("folder", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dataset.read("study", 32)
    assert not dataset.reasons


def test_trouble_with_the_temporary_folder_is_one_line_of_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere.*: No such file or directory; free some space or set TMPDIR"):
        ich_predict("a/model,b/model", [str(tmp_path)], str(tmp_path / "out.csv"))


def test_from_and_resume_refuse_data_that_is_not_what_it_was(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    images, csv = data / "stage_1_train_images", data / "stage_1_train.csv"
    images.mkdir(parents=True)
    csv.write_text("ID,Label\n")
    (images / "ID_1.dcm").write_bytes(b"one")
    made = prepare_run("tiny", data, run, {}, ("01_labels",), False)
    save_json(made.manifest | {"seconds": {"01_labels": 1.0}}, run / "manifest.json", checked=True)
    for stages, resume in ((("40_paper",), False), (("01_labels",), True)):
        prepare_run("tiny", data, run, {}, stages, resume)
        before = (run / "manifest.json").read_bytes()
        for path, other in ((csv, "ID,Label\n\n"), (images / "ID_1.dcm", "other"), (images / "ID_2.dcm", "two")):
            kept = path.read_bytes() if path.exists() else None
            path.write_text(other)
            with pytest.raises(InputError, match="cannot go on, the data is not what it was; run without --resume"):
                prepare_run("tiny", data, run, {}, stages, resume)
            path.unlink() if kept is None else path.write_bytes(kept)
        assert (run / "manifest.json").read_bytes() == before
    prepare_run("tiny", data, run, {}, ("01_labels",), False)
