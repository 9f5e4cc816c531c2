"""`read_labels` against the recipe of most notebooks on all 4,045,572 rows: seconds, peak memory, ratios of medians.

python benchmarks/labels.py [stage_1_train.csv]

Without a CSV: the real one in $ICH_REAL_DATA/rsna if it is there, else the same rows made from
data/label_combinations.csv.
"""

import gzip
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import polars  # noqa: F401  else its import would be timed, while pandas is there already

from ich_fastai.core import project_dir
from ich_fastai.labels import LABELS, read_combinations, read_labels


def pandas_recipe(csv):
    "Split the id, drop the duplicates, pivot."
    rows = pd.read_csv(csv)
    parts = rows["ID"].str.rsplit("_", n=1, expand=True)
    rows["image"], rows["kind"] = parts[0], parts[1]
    rows = rows[["Label", "image", "kind"]].drop_duplicates()
    return rows.pivot_table(values="Label", index="image", columns="kind")


def make_csv(path):
    "The label rows in the competition's form: real where they are at hand, else from the published counts."
    real = (
        Path(os.environ.get("ICH_REAL_DATA", project_dir().parent / "shared" / "data"))
        / "rsna"
        / "stage_1_train.csv.gz"
    )
    if real.is_file():
        with gzip.open(real) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
        return "the real rows"
    labels = read_combinations().to_numpy()
    with open(path, "w") as f:
        f.write("ID,Label\n")
        for i, row in enumerate(labels):
            f.writelines(f"ID_{i:09x}_{name},{value}\n" for name, value in zip(LABELS, row, strict=True))
        f.writelines(f"ID_{i:09x}_{name},{labels[i, k]}\n" for i in range(4) for k, name in enumerate(LABELS))
    return "rows made from the published counts"


def run_once(name, csv):
    "Seconds and peak MB of one reading in a fresh process."
    done = subprocess.run([sys.executable, __file__, str(csv), name], capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


def compare(csv, turns=3):
    readers = {"pandas": [], "read_labels": []}
    for _ in range(turns):
        for name, results in readers.items():
            results.append(run_once(name, csv))
    medians = {name: [statistics.median(x) for x in zip(*results, strict=True)] for name, results in readers.items()}
    for name, (seconds, megabytes) in medians.items():
        print(f"{name:>12}: {seconds:6.2f} s, peak {megabytes:,.0f} MB")
    ratio = medians["pandas"][0] / medians["read_labels"][0]
    print(f"read_labels is {ratio:.1f} times as fast (claim: 20 or more), memory claim: under 600 MB")


def main():
    if len(sys.argv) == 3:  # one reading, in this process
        reader = {"pandas": pandas_recipe, "read_labels": read_labels}[sys.argv[2]]
        start = time.perf_counter()
        assert len(reader(sys.argv[1])) == 674_258 or sys.argv[2] == "pandas"
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    elif len(sys.argv) == 2:
        compare(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            csv = Path(folder) / "stage_1_train.csv"
            print(make_csv(csv))
            compare(csv)


if __name__ == "__main__":
    main()
