"""Metrics with patient-bootstrap intervals against a loop over scikit-learn: speed, memory, do they cover the truth.

python benchmarks/evaluate.py [SECTION ...] [--slices 100000] [--resamples 1000] [--datasets 600] [--patients 400]

Sections: speed memory whole arms coverage seeds (all by default). Simulated labels with RSNA's prevalences,
39.5 slices a patient, one core.
The loop would take hours, so a few of its resamples are timed, in turn with ours, and the rest is extrapolated.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"

import numpy as np
import pandas as pd
from scipy.special import logit

from ich_fastai.labels import LABELS, LOGITS, class_balance, read_combinations
from ich_fastai.metrics import draw_patients, find_estimate, mean_metrics, metrics_table, rank_metrics
from ich_fastai.tiny import simulate_scores

SECTIONS = ("speed", "memory", "whole", "arms", "coverage", "seeds")
SLICES_PER_PATIENT = 674_258 / 17_079
THRESHOLD = 0.2


def use_one_core():
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def simulate_rsna(n):
    "Labels, probabilities and patients of n slices with RSNA's prevalences."
    prevalence = class_balance(read_combinations())["p"].to_numpy()
    return simulate_scores(n, max(2, round(n / SLICES_PER_PATIENT)), center=logit(prevalence))


def draw_levels(n):
    "Slices, and the studies they make: the largest probability of each patient."
    y, p, patient = simulate_rsna(n)
    studies = [pd.DataFrame(a).groupby(patient).max().to_numpy() for a in (y, p)]
    return {"slice": (y, p, patient), "study": (*studies, np.unique(patient))}


def our_tables(levels, resamples):
    for y, p, patient in levels.values():
        metrics_table(y, p, patient, np.full(y.shape, THRESHOLD), n_boot=resamples)


def sklearn_metrics(y, p):
    "The same metrics of one label, one scikit-learn call each."
    from sklearn import metrics as sk
    from sklearn.calibration import calibration_curve
    from sklearn.linear_model import LogisticRegression

    fpr, tpr, _ = sk.roc_curve(y, p)
    seen, said = calibration_curve(y, p, n_bins=10, strategy="quantile")
    return (
        sk.roc_auc_score(y, p),
        sk.average_precision_score(y, p),
        tpr[fpr <= 0.1].max(),
        tpr[fpr <= 0.05].max(),
        sk.log_loss(y, p),
        sk.brier_score_loss(y, p),
        np.abs(seen - said).mean(),
        sk.recall_score(y, p >= THRESHOLD),
        sk.recall_score(y, p >= THRESHOLD, pos_label=0),
        LogisticRegression(C=1e12).fit(logit(p)[:, None], y).coef_[0, 0],
    )


def sklearn_resample(levels, rng):
    "One resample of patients: gather their slices, then every metric of every label."
    for y, p, patient in levels.values():
        order = np.argsort(patient, kind="stable")
        starts = np.searchsorted(patient[order], np.arange(patient.max() + 2))
        rows = np.concatenate(
            [order[starts[k] : starts[k + 1]] for k in rng.integers(patient.max() + 1, size=patient.max() + 1)]
        )
        for k in range(len(LABELS)):
            sklearn_metrics(y[rows, k], p[rows, k])


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure_speed(options):
    levels, rng = draw_levels(options.slices), np.random.default_rng(0)
    seconds = {"ours": [], "loop": []}
    our_tables(levels, 10)
    for _ in range(3):
        seconds["ours"].append(timed(our_tables, levels, options.resamples))
        seconds["loop"].append(timed(sklearn_resample, levels, rng))
    ours, one = (statistics.median(values) for values in seconds.values())
    loop = one * options.resamples
    what = f"{options.resamples:,} resamples of all metrics, {len(LABELS)} labels, by slice and by study"
    print(f"ours, {what}: {ours:.1f} s (claim: 20 or less)")
    times = len(seconds["loop"])
    print(f"loop over scikit-learn: {one:.2f} s a resample, so about {loop:,.0f} s for all (extrapolated from {times})")
    print(f"ours is {loop / ours:.0f} times as fast (claim: 20 or more)")


def in_a_fresh_process(slices, resamples):
    "Seconds, and the peak resident size in MB of the whole process: imports, data and metrics."
    done = subprocess.run(
        [sys.executable, __file__, "--once", "--slices", str(slices), "--resamples", str(resamples)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(x) for x in done.stdout.split()]


def run_once(options):
    import resource

    seconds = timed(our_tables, draw_levels(options.slices), options.resamples)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_memory(options):
    seconds, peak = in_a_fresh_process(options.slices, options.resamples)
    print(f"peak memory of the whole process, data included: {peak:,.0f} MB (claim: under 1,500); {seconds:.1f} s")


def measure_whole(options):
    seconds, peak = in_a_fresh_process(674_258, options.resamples)
    print(
        f"all 674,258 slices of stage 1, {options.resamples:,} resamples: {seconds:.0f} s, peak memory {peak:,.0f} MB"
    )


def measure_arms(options):
    "Four arms of three seeds, two of them corrected, as notebook 25 compares them."
    import resource

    from ich_fastai.imbalance import compare_arms, difference_table, finding_table, table_2

    y, p, patient = simulate_rsna(options.slices)
    rng, rates = np.random.default_rng(1), {"undersample+inverse": 0.2, "undersample+none": 0.2}

    def train():  # one table at a time, as `read_arms` gives them
        for arm in (*rates, "none+inverse", "none+none"):
            for seed in range(3):
                x = logit(p) + rng.normal(0, 0.3, p.shape)
                columns = dict(zip(LABELS, y.T, strict=True)) | dict(zip(LOGITS, x.T, strict=True))
                ids = {"PatientID": patient, "fold": 0, "keep_rate": rates.get(arm, 1.0)}
                yield arm, seed, pd.DataFrame(ids | columns)

    def compare():
        compared = compare_arms(train(), n_boot=options.resamples)
        table_2(compared)
        finding_table(difference_table(compared))

    what = f"Table 2 with all differences, 4 arms of 3 seeds, raw and corrected, {options.resamples:,} resamples"
    seconds = timed(compare)
    print(f"{what}: {seconds:.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


def simulate_seeds(rng, seeds, patients, effect=0.0):
    "AUCs (seeds, b) of two arms on the same patients, hard or easy; seeds differ in skill and in what they see."
    y, p, patient = simulate_scores(12 * patients, patients, int(rng.integers(1e9)), hidden=1)
    patient, draws = draw_patients(patient, 200, 0)
    out = []
    for shift in (0.0, effect):
        skill = np.exp(rng.normal(shift, 0.25, seeds))[:, None]
        noise = rng.normal(0, 0.7, (seeds, patients))[:, patient] + rng.normal(0, 0.5, (seeds, len(y)))
        out.append(np.stack([rank_metrics(y, s, patient, draws, ())["auc"] for s in logit(p) * skill + noise]))
    return out


def measure_seeds(options, patients=25):
    "How often an interval of a difference leaves 0 out, of equal arms and of arms that differ."
    from ich_fastai.imbalance import widen

    print(f"{options.datasets} datasets of {patients} patients with 12 slices each on average; AUC")
    for seeds in (3, 5):
        for effect in (0.0, -0.75, -1.5):
            rng, found = np.random.default_rng(seeds), []
            for _ in range(options.datasets):
                a, b = simulate_seeds(rng, seeds, patients, effect)
                gap = a.mean(0) - b.mean(0)
                both, one = widen(find_estimate(gap), gap, (a, b), patients), find_estimate(a[0] - b[0])
                found.append((gap[0], *(e.low > 0 or e.high < 0 for e in (both, find_estimate(gap), one))))
            gap, both, means, one = np.mean(found, 0)
            error = 1.96 * (both * (1 - both) / options.datasets) ** 0.5
            print(
                f"{seeds} seeds, mean difference {gap:.3f}: 0 left out by {both:.1%} +- {error:.1%} over seeds and "
                f"patients, {means:.1%} over patients alone, {one:.1%} with one seed over patients alone"
            )


def find_all(y, p, patient, draws):
    "AUC, log loss and calibration error for every draw."
    means = mean_metrics(y, p, patient, draws)
    auc = rank_metrics(y, p, patient, draws, ())["auc"]
    return {"AUC": auc, "log loss": means["log_loss"], "calibration error": means["calibration_error"]}


def measure_coverage(options, each=10):
    n_patients, resamples = options.patients, options.resamples
    y, p, patient = simulate_scores(each * 300_000, 300_000, seed=10**6, hidden=1)
    truth = {name: values[0] for name, values in find_all(y, p, patient, np.ones((1, 300_000))).items()}
    print("truth, from 300,000 patients:", ", ".join(f"{name} {value:.4f}" for name, value in truth.items()))
    covered = {(way, name): 0 for way in ("by patient", "by slice") for name in truth}
    for seed in range(options.datasets):
        y, p, patient = simulate_scores(each * n_patients, n_patients, seed, hidden=1)
        for way, unit in (("by patient", patient), ("by slice", np.arange(len(y)))):
            for name, values in find_all(y, p, *draw_patients(unit, resamples, seed)).items():
                _, low, high, _ = find_estimate(values)
                covered[way, name] += low <= truth[name] <= high
    what = f"{n_patients} patients with {each} slices each on average, {resamples:,} resamples"
    print(f"{options.datasets} datasets of {what}:")
    for (way, name), n in covered.items():
        share = n / options.datasets
        error = 1.96 * (share * (1 - share) / options.datasets) ** 0.5
        claim = "claim: 93% to 97%" if way == "by patient" else "for comparison: too narrow"
        print(f"bootstrap {way}: the interval of the {name} holds the truth in {share:.1%} +- {error:.1%} ({claim})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=[], choices=[*SECTIONS, []])
    parser.add_argument("--slices", type=int, default=100_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--datasets", type=int, default=600, help="of the coverage")
    parser.add_argument("--patients", type=int, default=400, help="in each of them")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_one_core()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.once:
        return run_once(options)
    for section in options.sections or SECTIONS:
        print(
            f"## {section}, {options.slices:,} slices" if section in ("speed", "memory", "arms") else f"## {section}",
            flush=True,
        )
        globals()[f"measure_{section}"](options)


if __name__ == "__main__":
    main()
