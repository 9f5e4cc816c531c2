"""The repository itself: notebooks and modules agree, nothing private is committed, the wheel works."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import papermill
import pytest
from conftest import PROJECT
from PIL import Image

sys.path.insert(0, str(PROJECT / "benchmarks"))
import house

NOTEBOOKS = sorted((PROJECT / "nbs").glob("*.ipynb"))
TRACKED = [
    f
    for f in subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True).splitlines()
    if (PROJECT / f).is_file()
]
TEXT = [
    f
    for f in TRACKED
    if f.endswith((".py", ".ipynb", ".md", ".ini", ".toml", ".yml", ".csv", ".lock", "Makefile", "run"))
]


def run(*command, cwd=PROJECT, **kwargs):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def script(name):
    return shutil.which(name, path=sysconfig.get_path("scripts")) or name


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


def test_what_is_committed_is_known():
    assert len(TRACKED) > 100 and len(TEXT) > 90


def test_the_rooms_of_the_house_are_there():
    assert {p.stem[0] for p in NOTEBOOKS} == set("012349"), "data, model, evidence, use, study; 9: fixtures"


def test_clean_and_export_leave_no_diff(tmp_path):
    for name in TRACKED:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, target)
    run("git", "init", "-q", cwd=tmp_path)
    run(script("nbdev-clean"), cwd=tmp_path)
    run(script("nbdev-export"), cwd=tmp_path)
    changed = [f for f in TRACKED if (tmp_path / f).read_bytes() != (PROJECT / f).read_bytes()]
    assert not changed, f"run `make prepare` and commit: {changed}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_each_notebook_keeps_the_house_style(notebook):
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "one cell tagged parameters"
    parameters = papermill.inspect_notebook(notebook)
    assert 1 <= len(parameters) <= 12 + 4 * (notebook.stem == "12_train"), "what a training is, and its folds"
    assert all(p["inferred_type_name"] != "None" and p["help"] for p in parameters.values()), "typed, with a comment"
    prose = "\n".join("".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "markdown")
    assert (
        re.match(r"# .+\n\n> ", prose)
        and "**Reads**" in prose
        and "**Answers**" in prose
        and "## What we now know" in prose
    )
    assert notebook.stat().st_size < 300 * 1024
    assert not [c for c in cells(notebook) if any(o["output_type"] == "error" for o in c.get("outputs", []))]


@pytest.mark.parametrize("name", [p.stem for p in NOTEBOOKS])
def test_a_module_imports_only_lower_numbers(name):
    order = {p.stem.partition("_")[2]: p.stem for p in NOTEBOOKS}  # 00c_guard comes after 00_core
    own = name.partition("_")[2]
    imported = set(
        re.findall(r"(?:from|import) (?:ich_fastai)?\.(\w+)", (PROJECT / "ich_fastai" / f"{own}.py").read_text())
    ) - {own}
    assert all(order[module] < name for module in imported), imported


def test_definitions_are_shown_and_rooms_stay_small():
    found = {p.stem: house.find_hidden(p) for p in NOTEBOOKS}
    shown = {name: 1 - len(hidden) / n for name, (n, hidden) in found.items()}
    assert min(shown.values()) >= 0.45, {name: found[name][1] for name in shown if shown[name] < 0.45}
    total, hidden = sum(n for n, _ in found.values()), sum(len(hidden) for _, hidden in found.values())
    assert 1 - hidden / total >= 0.65
    lines = {p.stem: sum(map(house.count_lines, house.code_cells(p))) for p in NOTEBOOKS}
    assert max(lines.values()) <= 400, {name: n for name, n in lines.items() if n > 400}


def test_functions_and_lines_are_short():
    modules = sorted((PROJECT / "ich_fastai").glob("[!_]*.py"))
    assert not {p.stem: names for p in modules if (names := house.long_functions(p))}
    sources = [*modules, *NOTEBOOKS, *(PROJECT / "tests").glob("*.py"), *(PROJECT / "benchmarks").glob("*.py")]
    assert not {p.name: lines for p in sources if (lines := house.long_lines(p))}


def outputs_of(notebook):
    "All text that a committed notebook's cells have printed or shown."
    texts = []
    for output in (o for c in cells(notebook) for o in c.get("outputs", ())):
        texts += [output.get("text", "")] + [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(t) for t in texts)


def test_no_output_is_a_wall_of_text():
    "What a reader would have to scroll past: a list of a thousand files, a whole traceback."
    for notebook in NOTEBOOKS:
        for output in (o for c in cells(notebook) for o in c.get("outputs", ())):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert len("".join(text).splitlines()) <= 70, f"{notebook.stem}: {''.join(text)[:200]}"


def numbers_in(text):
    "(number, decimals) of each number in a text, whatever its thousands are parted by."
    found = re.findall(r"(?<![\w.])\d[\d,_]*(?:\.\d+)?(?:e-?\d+)?(?![\w])|(?<![\w.])\.\d+", text)
    return [
        (float(n.replace(",", "").replace("_", "")), len(n.partition(".")[2])) for n in (f.rstrip(",_") for f in found)
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_numbers_in_the_conclusion_come_from_the_notebook(notebook):
    sources = ["".join(c["source"]) for c in cells(notebook)]
    known = next(s for s in sources if s.startswith("## What we now know"))
    there = {n for n, _ in numbers_in(outputs_of(notebook) + "\n".join(s for s in sources if s is not known))}
    there |= {100 * n for n in there}  # a share, said in percent
    said = [(n, digits) for n, digits in numbers_in(known) if digits > 1 or n >= 1000]
    assert not [n for n, digits in said if not any(abs(round(t, digits) - n) < 1e-9 for t in there)]


def test_the_readme_says_what_the_committed_demo_gave():
    said = re.findall(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", (PROJECT / "README.md").read_text())
    shown = "".join(outputs_of(PROJECT / "nbs" / f"{name}.ipynb") for name in ("22_evaluate", "23_controls"))
    assert said and not [estimate for estimate in said if estimate not in shown]


def test_the_picture_of_the_viewer_is_of_the_committed_demo():
    of = Image.open(PROJECT / "nbs" / "images" / "viewer.png").text.get("about", "")
    p = re.fullmatch(r"\d+ slices, any (\d\.\d{3})", of)
    assert p and p[1] in outputs_of(PROJECT / "nbs" / "32_viewer.ipynb"), f"run `make outputs`; the picture is of: {of}"


def test_the_version_is_one():
    version = re.search(r"(?m)^version = (.+)$", (PROJECT / "settings.ini").read_text()).group(1)
    assert f"\nversion: {version}\n" in (PROJECT / "CITATION.cff").read_text()
    assert f"## {version} " in (PROJECT / "CHANGELOG.md").read_text()
    assert (PROJECT / "ich_fastai" / "__init__.py").read_text() == f'__version__ = "{version}"\n'


def test_nothing_committed_carries_a_machine_path_or_registry():
    private = re.compile(
        r"/(?:root|home|work|tmp|Users)/[A-Za-z]|pypi\.org|files\.pythonhosted|https?://[^\s]*/simple|file:///"
    )
    found = [
        (f, m.group())
        for f in TEXT
        if f != "tests/test_hygiene.py"
        for m in [private.search((PROJECT / f).read_text(errors="replace"))]
        if m
    ]
    assert not found


def test_lock_holds_names_and_versions_only():
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    wrong = [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s/]+( ; sys_platform == \"linux\")?", line)
    ]
    assert lines and not wrong


def test_wheel_installs_in_an_empty_environment(tmp_path):
    source = tmp_path / "source"
    for name in TRACKED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    # The dependencies (6 GB) come from this environment; `pip check` says whether the wheel names them rightly.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (tmp_path / "deps.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copy(tmp_path / "deps.pth", site)
    for name in ("ich-reproduce", "ich-phantom", "ich-ingest", "ich-predict", "ich-validate", "ich-onnx"):
        assert "usage" in run(tmp_path / "env" / "bin" / name, "--help", cwd=tmp_path)
    where = run(python, "-I", "-c", "import ich_fastai; print(ich_fastai.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where, "the installed wheel is what ran"
    assert "No broken requirements" in run(*pip, "check", cwd=tmp_path)


def test_no_stage_stands_on_the_fixtures():
    modules = {
        p.stem: p.read_text() for p in (PROJECT / "ich_fastai").glob("*.py") if p.stem not in ("tiny", "_modidx")
    }
    assert len(modules) > 20 and not [
        m for m, text in modules.items() if re.search(r"import tiny\b|\btiny import", text)
    ]
