"A model folder as ONNX gives the probabilities of torch and says what it is; what it cannot hold is refused in a line."

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import save_file

from ich_fastai.batches import Settings, named_windows
from ich_fastai.bleeding import draw_bleed
from ich_fastai.core import InputError
from ich_fastai.exports import View, draw_view
from ich_fastai.head import draw_head, make_rng
from ich_fastai.labels import LABELS
from ich_fastai.network import build_model
from ich_fastai.model import load_model, make_card, predict_logits, save_model
from ich_fastai.onnx import export_onnx, ich_onnx
from ich_fastai.predict import decide, find_inputs


def make_folder(folder, arch, cache=128, **about):
    "A model folder of an untrained network with a calibration, and its thresholds."
    torch.manual_seed(0)
    settings = Settings(arch=arch, image_size=64, windows=named_windows(["brain", "stroke"]), neighbors=1)
    data = {"geometry": {"field_mm": [220.0, 240.0, 264.0], "spacing_mm": [4.0, 5.0, 6.0]}}
    card = make_card(settings, cache, [{"fold": 0, "slices": 9, "positives": 4, "keep_rate": 0.4}], data)
    fit = {label: {"slope": 0.8 + k / 9, "intercept": k / 9 - 0.3} for k, label in enumerate(LABELS)}
    card["corrections"] = {"keep_rate": 0.4, "calibration": fit}
    save_model(build_model(arch, settings.n_in, image_size=64), card | {"smooth": 1 / 3} | about, folder)
    return folder


def test_the_file_says_what_torch_says(tmp_path, capsys):  # notebook 37 tries a resnet10t
    folder, path = make_folder(tmp_path / "model", "tf_efficientnet_lite0"), tmp_path / "model.onnx"
    ich_onnx(str(folder), str(path))
    assert "Averaging along the series (a weight of 0.33) is not in it" in capsys.readouterr().out
    rng, view = make_rng(3, 0), View(size=128)
    head, bleeds = draw_head(rng), [draw_bleed(rng, "subdural")]
    hu = np.stack([np.rint(draw_view(head, bleeds, view, k, rng)) for k in range(2, 13, 2)]).astype(np.int16)
    model, inputs = load_model(folder, "cpu"), find_inputs(len(hu), 1)
    expected = predict_logits(model, hu, inputs)
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits, p = session.run(["logits", "probabilities"], {"hu": hu[inputs]})
    assert np.abs(logits - expected).max() < 1e-3
    assert np.abs(p - decide(expected, model.card)[list(LABELS)].to_numpy()).max() < 1e-4
    assert np.ptp(p) > 0.01, "the slices differ"
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["labels"]) == list(LABELS) and len(said["weights_sha256"]) == 64
    assert (json.loads(said["mm_per_pixel"]), json.loads(said["smooth"])) == (240 / 128, pytest.approx(1 / 3))
    assert "research" in said["not_a_medical_device"]


def test_what_it_cannot_hold_is_refused(tmp_path, monkeypatch):
    series = make_folder(tmp_path / "series", "resnet10t", recurrent={"units": 8})
    large, good = make_folder(tmp_path / "large", "resnet10t", 32), make_folder(tmp_path / "good", "resnet10t")
    save_file({"say.1.bias": torch.zeros(6)}, series / "recurrent.safetensors")
    for folder, name, why in (
        (series, "a.onnx", "recurrent network"),
        (large, "a.onnx", "image_size is above the cache's"),
        (good, "a.pt", "ends in .onnx"),
        (tmp_path, "a.onnx", "no model.json"),
    ):
        with pytest.raises(InputError, match=why):
            export_onnx(folder, tmp_path / name)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else found(name, *a))
    with pytest.raises(InputError, match=r'pip install "ich_fastai\[onnx\]"'):
        export_onnx(good, tmp_path / "a.onnx")
    assert not list(tmp_path.glob("a.*"))


def test_what_the_model_was_not_taught_it_does_not_say(tmp_path):
    folder = make_folder(tmp_path / "model", "resnet10t", labels=["subdural", "any"])
    path, hu = tmp_path / "model.onnx", np.zeros((2, 3, 128, 128), np.int16)
    ich_onnx(str(folder), str(path))
    p = InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["probabilities"], {"hu": hu})[0]
    assert (np.isnan(p) == [label not in ("subdural", "any") for label in LABELS]).all()


def test_a_file_that_is_there_is_kept_unless_it_is_one_of_ours_and_the_new_one_is_good(tmp_path, monkeypatch):
    folder, mine, ours = make_folder(tmp_path / "model", "resnet10t"), tmp_path / "mine.onnx", tmp_path / "ours.onnx"
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "another program's", [], []))
    for data in (foreign.SerializeToString(), b"", b"a note"):
        mine.write_bytes(data)
        with pytest.raises(InputError, match="mine.onnx: is there, and is no ONNX file of this package"):
            ich_onnx(str(folder), str(mine))
        assert mine.read_bytes() == data
    ich_onnx(str(folder), str(ours))
    before = ours.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="ours.onnx: not written, it differs"):
        patch.setattr("ich_fastai.onnx.export_onnx", lambda _, path: Path(shutil.copy(ours, path)))
        patch.setattr("ich_fastai.onnx.check_onnx", lambda *_: 0.5)
        ich_onnx(str(folder), str(ours))
    assert ours.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.onnx", "model", "ours.onnx"]
