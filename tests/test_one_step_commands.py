"""The commands with one-step generators, as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffusion import Generator
from diffusion.data import to_uint8
from diffusion.gradient_flow.one_step import OneStepGenerator

ROOT = Path(__file__).parents[1]
SMALL = [
    "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.log_every=2", "trainer.batch_size=16", "trainer.warmup=2",
    "objective.particles=24", "model.width=16", "model.depth=1", "device=cpu", "logger=none",
]  # fmt: skip
TINY = ["experiment=digits_onestep", *SMALL]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a very short run, made by a real process, and what it printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, ROOT / "scripts" / "train.py", *TINY, "num_samples=60", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_one_step_generator_is_trained_evaluated_and_resumed(run, trained, tmp_path):
    folder, out = trained
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "evaluation.json", "checkpoints", "samples.png", "samples.npz",
        "samples_0000003.png", "samples_0000006.png",
    }  # fmt: skip
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    losses, held_out = ([row[name] for row in rows if name in row] for name in ("loss", "test_loss"))
    assert len(losses) == 4 and len(held_out) == 2
    line = (
        f"the functional: training {losses[0]:.4g} at step 2, {losses[-1]:.4g} at step 6; "
        f"held out {held_out[0]:.4g} at step 3, {held_out[1]:.4g} at step 6"
    )
    assert line in out
    assert "a flow to a finite data set can memorise it" in out and "Frechet distance" in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["field"] is None and config["sampler"] is None
    on = ["num_samples=0", "trainer.steps=8", f"resume={folder}/checkpoints/last", f"hydra.run.dir={tmp_path / 'on'}"]
    status, out, err = run("train", *TINY, *on)
    assert status == 0 and "continuing" in out and "steps 6 -> 8" in err, err
    rows = [json.loads(row) for row in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [8]


def test_it_is_sampled_in_one_evaluation_and_evaluated(run, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last"
    status, out, err = run(
        "sample", f"checkpoint={last}", "num_samples=9", "batch_size=4", f"hydra.run.dir={tmp_path / 's'}"
    )
    assert status == 0 and out.startswith("9 samples, 1 evaluation each: "), err
    images = np.load(tmp_path / "s" / "samples.npz")["images"]
    assert np.array_equal(images, to_uint8(OneStepGenerator.load(last).sample(9)).movedim(1, -1).numpy())
    status, out, err = run("evaluate", f"checkpoint={last}", "num_samples=60", f"hydra.run.dir={tmp_path / 'e'}")
    assert status == 0, err
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (found["sampler"], found["evaluations"]) == ("one step", 1)
    assert found["generated"] == json.loads((trained[0] / "evaluation.json").read_text())["generated"]
    ratio = found["generated"]["nearest_train"] / found["real"]["nearest_train"]
    assert f"samples lie {ratio:.2f} times as far from the nearest training example as held-out data do" in out


@pytest.mark.parametrize("objective", ["drifting", "energy"])
def test_other_recipes_train(run, tmp_path, objective):
    options = [*TINY, f"objective={objective}", "num_samples=0", "trainer.steps=2"]
    status, out, err = run("train", *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert status == 0 and "the functional: training" in out, err


def test_a_conditional_one_and_points(run, tmp_path):
    folder = tmp_path / "run"
    options = ["conditional=true", "data=moons", "objective=energy", "num_samples=50"]
    status, _, err = run("train", *TINY, *options, "trainer.batch_size=32", f"hydra.run.dir={folder}")
    assert status == 0, err
    last = f"checkpoint={folder}/checkpoints/last"
    assert run("sample", last, "num_samples=3", "label=1")[0] == 0
    status, _, err = run("sample", last, "num_samples=3", "label=2")
    assert status == 2 and "label is [2], but this generator expects a class from 0 to 1" in err


MISTAKES = [
    ("sample", ["sampler.steps=4"], "a one-step generator has no sampler, but sampler.steps=4 was given"),
    ("sample", ["sampler=euler"], "a one-step generator has no sampler, but sampler=euler was given"),
    ("evaluate", ["sampler.steps=4"], "a one-step generator has no sampler"),
    ("evaluate", ["likelihood=5"], "likelihood is 5, expected 0: a one-step generator gives samples alone"),
    ("tune", ["nfe=3"], "holds a OneStepGenerator, expected a Generator"),
    ("audit", [], "holds a OneStepGenerator, expected a Generator"),
]


def test_what_makes_no_sense_ends_in_one_line(run, trained):
    last = trained[0] / "checkpoints" / "last"
    for command, options, words in MISTAKES:
        status, _, err = run(command, f"checkpoint={last}", *options)
        assert status == 2 and err.count("\n") == 1 and words in err, (command, err)


TRAINING = [
    (["field=linear"], "a one-step generator has no field, but field=linear was given"),
    (["field.horizon=3"], "a one-step generator has no field, but field.horizon=3 was given"),
    (["sampler.steps=3"], "a one-step generator has no sampler, but sampler.steps=3 was given"),
    (["objective.particles=0"], "particles is 0, expected a whole number"),
    (["objective.step=-1"], "step is -1, expected a positive number"),
    (["objective.functional.blur=-1"], "blur is -1"),
    (["objective=drifting", "objective.log_value=true"], "the drifting field has no value"),
    (["objective=drifting", "objective.functional.taus=[]"], "taus is []"),
]


@pytest.mark.parametrize(("options", "words"), TRAINING, ids=lambda value: str(value)[:40])
def test_options_that_make_no_sense_are_refused_in_one_line(run, tmp_path, options, words):
    status, _, err = run("train", *TINY, "num_samples=0", *options, f"hydra.run.dir={tmp_path / 'run'}")
    lines = [line for line in err.splitlines() if line.strip() and "step/s" not in line and "?step" not in line]
    assert status == 2 and words in err and len(lines) == 1, err


def test_a_run_of_another_kind_is_not_resumed(run, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last"
    field = [
        "experiment=digits_gravity",
        *[option for option in SMALL if "objective" not in option],
        "model=mlp",
        "validate=false",
    ]
    status, _, err = run("train", *field, "num_samples=0", f"resume={last}", f"hydra.run.dir={tmp_path / 'other'}")
    assert status == 2 and "is of another architecture: model._target_ is" in err


def test_a_function_of_ones_own_gives_the_features(run, module, tmp_path):
    module("own_features", "def halves(x):\n    return x.flatten(1)[:, ::2]\n")
    folder = tmp_path / "run"
    options = [*TINY, "objective.features=own_features.halves", "num_samples=0", f"hydra.run.dir={folder}"]
    status, _, err = run("train", *options)
    assert status == 0, err
    assert not isinstance(OneStepGenerator.load(folder / "checkpoints" / "last"), Generator)
