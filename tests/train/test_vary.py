"""Trajectories of different settings in one population."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.train.prepare import prepare
from chorus.train.run import Run
from chorus.train.settings import Settings
from chorus.train.trajectory import Trajectory
from chorus.train.vary import parse_variations
from tests.train.conftest import TINY

CPU = torch.device("cpu")


def test_values_are_read_as_what_the_setting_is() -> None:
    found = parse_variations(
        ("lr=0.01, 0.02", "distil-after=2,saturation", "optimiser=muon,adamw", "batch-tokens=512,1024")
    )
    assert found == {
        "lr": (0.01, 0.02), "distil_after": (2, "saturation"), "optimiser": ("muon", "adamw"), "batch_tokens": (512, 1024),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (("width=64,128",), "'width' cannot differ between trajectories; these can: lr, weight-decay"),
        (("lr=0.1,fast",), "'fast' is not a value of --lr"),
        (("lr",), "'' is not a value of --lr"),
        (("lr=0.1,0.2", "lr=0.3,0.4"), "--vary lr is set twice"),
    ],
)
def test_words_that_are_no_values(texts: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ChorusError, match=sentence):
        parse_variations(texts)


def test_settings_of_each_trajectory_are_checked_and_taken_in_turn() -> None:
    settings = replace(TINY, trajectories=3, vary={"lr": (0.01, 0.02), "distil_alpha": (0.0, 0.3, 0.5)})
    assert [(own.lr, own.distil_alpha) for own in settings.of_each()] == [(0.01, 0.0), (0.02, 0.3), (0.01, 0.5)]
    assert settings.of_trajectory(1).vary == {}
    assert Settings(**json.loads(json.dumps(settings.as_json()))).as_json() == settings.as_json()
    with pytest.raises(ChorusError, match=r"--lr is -1; expected a number above 0"):
        replace(TINY, vary={"lr": (0.01, -1)})
    with pytest.raises(ChorusError, match=r"--vary lr has 3 values for --trajectories 2"):
        replace(TINY, vary={"lr": (0.01, 0.02, 0.03)})
    with pytest.raises(ChorusError, match=r"--vary lr has 1 value for"):
        replace(TINY, vary={"lr": (0.01,)})
    with pytest.raises(ChorusError, match=r"--vary width is not possible"):
        replace(TINY, vary={"width": (32, 64)})


def test_a_trajectory_of_other_settings_is_that_of_a_run_of_those_settings(tmp_path: Path) -> None:
    changes = {"lr": 0.004, "batch_tokens": 256, "weight_decay": 0.1, "distil_alpha": 0.0}
    varied = prepare(
        replace(TINY, vary={name: (getattr(TINY, name), value) for name, value in changes.items()}), tmp_path / "varied"
    )
    alike = prepare(replace(TINY, **changes), tmp_path / "alike")  # type: ignore[arg-type]
    assert Trajectory(Run.load(varied.directory), 1, CPU).train(lambda record: None, lambda: False)
    assert Trajectory(alike, 1, CPU).train(lambda record: None, lambda: False)
    found, expected = (manifest.load(run.directory).members for run in (varied, alike))
    assert [member.name for member in found] == ["t1-c00", "t1-c01"]
    assert [(member.name, member.teacher, member.sha256) for member in found] == [
        (member.name, None, member.sha256) for member in expected
    ]
    assert len(list(varied.schedule(1).cycles())) == 2
    assert varied.schedule(1).cycles()[0].steps > varied.schedule(0).cycles()[0].steps
    assert manifest.load(varied.directory).provenance.settings["vary"] == {
        name: [getattr(TINY, name), value] for name, value in changes.items()
    }
