"""Fixtures that several test files share."""

import json
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.inputs import prepare_data
from ich_fastai.reproduce import read_preset
from ich_fastai.tiny import tiny_cohort

PROJECT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist keeps every core busy; more threads would only wait


LONG = ("test_notebooks", "test_chain", "test_real_data", "test_evaluate", "test_validate", "test_ingest", "test_train")


def pytest_collection_modifyitems(items):
    "The longest files first: with two workers, what starts last decides when all is done."
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def run_cells(name, **params):
    "The cells of a notebook, in this process, with these parameters."
    import matplotlib.pyplot as plt

    space: dict = {"__name__": "__main__"}
    for k, cell in enumerate(json.loads((PROJECT / "nbs" / f"{name}.ipynb").read_text())["cells"], 1):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "skip-execution" not in tags:
            exec(compile("".join(cell["source"]), f"{name}, cell {k}", "exec"), space)
        space |= params if "parameters" in tags else {}
    plt.close("all")


LAYOUT_SIZE = 64  # px

CANARY, BORN = "CANARY", "19010203"
KEPT = {"PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality", "PhotometricInterpretation"}
KEPT |= {"ImageType", "RescaleType", "BodyPartExamined", "SpecificCharacterSet", "FrameOfReferenceUID"}
KEPT |= {"SeriesDescription", "ConvolutionKernel", "ContrastBolusAgent"}  # a survey of series shows these
NAMES = ("PatientName", "PatientBirthDate", "InstitutionName", "ReferringPhysicianName", "StudyDescription")


def draw_canaries():
    "A dataset of pydicom: a canary in every text element of DICOM's that a run has no use for, and in the private."
    from pydicom import Dataset, datadict

    dataset = Dataset()
    short = {"SH": f"{CANARY}_SH", "CS": "CANARY_CS", "AE": "CANARY_AE", "PN": f"{CANARY}^Ada", "DA": BORN}
    long = dict.fromkeys(("LO", "LT", "ST", "UT", "UC"), f"{CANARY} Hospital")
    for tag, (kind, _, _, retired, keyword) in datadict.DicomDictionary.items():
        plain = keyword and not retired and tag >> 16 not in (0x0000, 0x0002, 0x0004) and keyword not in KEPT
        if plain and kind in short | long:
            setattr(dataset, keyword, (short | long)[kind])
    dataset.private_block(0x0019, f"{CANARY} TEST", create=True).add_new(0x02, "LO", f"{CANARY} private")
    return dataset


def plant_canaries(data_dir):
    "Canaries into every file of a dataset in the RSNA layout that can be read."
    import pydicom

    canaries = list(draw_canaries())
    for path in (data_dir / "stage_1_train_images").iterdir():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the phantom's truncated file
            dataset = pydicom.dcmread(path)
            dataset.update({e.tag: e for e in canaries if e.keyword in NAMES or e.tag not in dataset})
            dataset.save_as(path)


def find_canaries(path):
    "Canaries in a file, packed or not: as text in UTF-8 or UTF-16."
    data, words = Path(path).read_bytes() + unpack(Path(path)), (CANARY, BORN, "Hospital")
    return [word for word in words if word.encode() in data or word.encode("utf-16-le") in data]


def unpack(path):
    "What compression hides: the values of parquet, the members of a zip (npz, pt), the texts of a PNG."
    if path.suffix == ".parquet":
        return str(pq.read_table(path).to_pylist()).encode()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            return b"".join(map(packed.read, packed.namelist()))
    return str(Image.open(path).info).encode() if path.suffix == ".png" else b""


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


IMPORTED = "fastai.distributed fastai.learner fastai.callback.all timm sklearn.metrics scipy.stats pandas pydicom cv2"
IMPORTED += " matplotlib.pyplot seaborn papermill nbconvert nbdev.test"  # not polars: its threads outlive no fork


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "A temporary folder of all workers together."
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def layouts(shared):
    "Each layout of another hospital's, made once for all workers: its folder and its truth."
    from ich_fastai.layouts import LAYOUTS, write_layout

    kept = shared / "layouts.pickle"
    with FileLock(shared / "layouts.lock"):
        if not kept.exists():
            truths = {name: write_layout(name, shared / "layouts" / name, size=LAYOUT_SIZE) for name in LAYOUTS}
            kept.write_bytes(pickle.dumps(truths))
    return {name: (shared / "layouts" / name, truth) for name, truth in pickle.loads(kept.read_bytes()).items()}


@pytest.fixture(scope="session")
def warm(shared):
    "What starts a Python at once (warm.py); one server for all workers. The rooms themselves are imported anew."
    base, owner = shared, os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    start = [sys.executable, str(PROJECT / "tests" / "warm.py")]
    with FileLock(base / "warm.lock"):
        if not (base / "warm").exists():
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            server = subprocess.Popen([*start, "--serve", base / "warm", str(owner), *IMPORTED.split()], **quiet)
            while not (base / "warm").exists():
                assert server.poll() is None, "warm.py does not start"
                time.sleep(0.1)
    return [sys.executable, "-I", "-S", start[-1], str(base / "warm")]


@pytest.fixture(scope="session")
def command(warm, tmp_path_factory):
    "Run a console command, its kernels warm too: command('ich-reproduce', '--preset', 'tiny') gives what it said."
    jupyter = tmp_path_factory.mktemp("jupyter")
    kernel = {"argv": [*warm, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "warm"}
    kernel |= {"language": "python", "env": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}}
    (jupyter / "kernels" / "python3").mkdir(parents=True)
    (jupyter / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))

    def run(name, *arguments, timeout=900, cold=False, **kwargs):  # cold: as a user starts it
        path = PROJECT / ".venv" / "bin" / name
        program = str(path) if path.exists() else shutil.which(name)
        return subprocess.run(
            [*(() if cold else warm), program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"JUPYTER_PATH": str(jupyter)},
            **kwargs,
        )

    return run


@pytest.fixture(scope="session")
def tiny_run(command, tmp_path_factory):
    "A finished run of the tiny preset: the whole chain through papermill, on the phantom, its files full of canaries."
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    plant_canaries(prepare_data(None, run_dir, read_preset("tiny")))
    done = command("ich-reproduce", "--preset", "tiny", "--out", run_dir)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run_dir, done


@pytest.fixture(scope="module")
def simulated_run(tmp_path_factory):
    "A run folder of the tiny cohort with simulated predictions for two folds: no training needed."
    run_dir = tmp_path_factory.mktemp("simulated")
    for name in ("labels.parquet", "slices.parquet", "cohort.parquet", "cache"):
        source = tiny_cohort() / name
        shutil.copytree(source, run_dir / name) if source.is_dir() else shutil.copy(source, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def write_predictions():
    "write_predictions(run_dir, cohort rows, folds): predictions.parquet and a trained-looking, untrained model."
    return _write_predictions


def _write_predictions(run_dir, rows, folds):
    import torch

    from ich_fastai.batches import Settings, named_windows
    from ich_fastai.network import build_model
    from ich_fastai.model import make_card, save_model

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    ids = rows[["SOPInstanceUID", "PatientID", "StudyInstanceUID", "fold", *LABELS]].reset_index(drop=True)
    logits = 2 * rows[list(LABELS)].to_numpy(float) - 1 + rng.normal(size=(len(rows), 6))
    ids = ids.assign(**dict(zip(LOGITS, logits.astype("float32").T, strict=True)), keep_rate=0.4)
    ids.to_parquet(run_dir / "predictions.parquet")
    settings = Settings(image_size=96, windows=named_windows(["brain"]))
    card = make_card(settings, 256, [{"fold": int(f), "keep_rate": 0.4} for f in folds])
    save_model(build_model("resnet10t", 3), card, run_dir / "model")


@pytest.fixture(scope="session")
def too_little():
    "too_little(cohort, which): rows of it on which next to nothing can be computed."
    return lambda cohort, which: {
        "no positive": cohort[(cohort["fold"] == 0) & (cohort["any"] == 0)],
        "one patient": cohort[cohort["PatientID"] == cohort["PatientID"].iloc[0]],
        "one slice": cohort.head(1),
    }[which]
