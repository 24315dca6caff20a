"""The commands with one-step generators, as a user types them."""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from diffusion.data import digits, to_uint8
from diffusion.gradient_flow.one_step import OneStepGenerator

ROOT = Path(__file__).parents[1]
SMALL = [
    "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.log_every=2", "trainer.batch_size=16", "trainer.warmup=2",
    "objective.particles=24", "model.width=16", "model.depth=1", "device=cpu", "logger=none",
]  # fmt: skip
TINY = ["experiment=digits_onestep", *SMALL]
POINTS = [*TINY, "data=moons", "data.size=300"]  # no classifier has to be trained for their evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a very short run, and what it printed."""
    folder, out = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    command = [str(ROOT / "scripts" / "train.py"), *POINTS, "num_samples=60", f"hydra.run.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder.parent)
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        patch.setattr(sys, "argv", command)
        runpy.run_path(command[0], run_name="__main__")
    return folder, out.getvalue()


def test_a_one_step_generator_is_trained_evaluated_and_resumed(run, trained, tmp_path):
    folder, out = trained
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "evaluation.json", "checkpoints", "samples.png", "samples.npz",
        "samples_0000003.png", "samples_0000006.png",
    }  # fmt: skip
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    line = []
    for name, steps, title in (("loss", [2, 3, 4, 6], "training"), ("test_loss", [3, 6], "held out")):
        found = {row["step"]: row[name] for row in rows if name in row}
        assert list(found) == steps
        lowest = min(found, key=found.get)
        line.append(f"{title} {found[steps[0]]:.4g} at step {steps[0]}, {found[6]:.4g} at step 6, least ")
        line[-1] += f"{found[lowest]:.4g} at {lowest}"
    assert f"the functional: {'; '.join(line)}\n" in out
    assert "a flow to a finite data set can memorise it" in out and "Frechet distance" in out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["field"] is None and config["sampler"] is None
    on = ["num_samples=0", "trainer.steps=8", f"resume={folder}/checkpoints/last", f"hydra.run.dir={tmp_path / 'on'}"]
    with pytest.warns(UserWarning, match="resuming with other options: steps 6 -> 8"):
        status, out, err = run("train", *POINTS, *on)
    assert status == 0 and "continuing" in out, err
    rows = [json.loads(row) for row in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [8]


def test_a_functional_that_has_risen_again_is_seen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    descent = runpy.run_path(str(ROOT / "scripts" / "train.py"))["_descent"]
    rows = [{"step": step, "test_loss": value} for step, value in ((10, 4.0), (20, 1.0), (30, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = descent(tmp_path, SimpleNamespace(log_value=True))
    assert said == "the functional: held out 4 at step 10, 2 at step 30, least 1 at 20"


def test_it_is_sampled_in_one_evaluation_and_evaluated(run, trained, tmp_path):
    last = trained[0] / "checkpoints" / "last"
    status, out, err = run(
        "sample", f"checkpoint={last}", "num_samples=9", "batch_size=4", f"hydra.run.dir={tmp_path / 's'}"
    )
    assert status == 0 and out.startswith("9 samples, 1 evaluation each: "), err
    points = np.load(tmp_path / "s" / "samples.npz")["points"]
    assert np.array_equal(points, OneStepGenerator.load(last).sample(9).numpy())
    status, out, err = run("evaluate", f"checkpoint={last}", "num_samples=60", f"hydra.run.dir={tmp_path / 'e'}")
    assert status == 0, err
    found = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert (found["sampler"], found["evaluations"]) == ("one step", 1)
    assert found["generated"] == json.loads((trained[0] / "evaluation.json").read_text())["generated"]
    mine, real = found["generated"], found["real"]
    ratio = mine["nearest_train"] / real["nearest_train"]
    assert f"samples lie {ratio:.2f} times as far from the nearest training example as held-out data do; " in out
    assert f"{mine['memorised']:.1%} of them, and {real['memorised']:.1%} of those" in out


RECIPES = {"drifting": "the mean square of the step: training", "energy": "the functional: training"}


@pytest.mark.parametrize("objective", RECIPES)
def test_other_recipes_train(run, tmp_path, objective):
    options = [*TINY, f"objective={objective}", "num_samples=0", "trainer.steps=2"]
    status, out, err = run("train", *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert status == 0 and RECIPES[objective] in out, err
    last = tmp_path / "run" / "checkpoints" / "last"
    status, _, err = run("sample", f"checkpoint={last}", "num_samples=4", "seed=3", f"hydra.run.dir={tmp_path / 's'}")
    assert status == 0, err
    images, generator = np.load(tmp_path / "s" / "samples.npz")["images"], OneStepGenerator.load(last)
    assert np.array_equal(images, to_uint8(generator.sample(4, seed=3)).movedim(1, -1).numpy())
    x0 = digits().train.take(torch.arange(1347)).x
    torch.testing.assert_close(generator.centre, x0.mean(0))
    assert float(generator.std) == pytest.approx(float((x0 - x0.mean(0)).square().mean().sqrt()))


def test_a_conditional_one_of_points_draws_the_class_that_is_asked_for(run, tmp_path):
    """The moons: the first lies 0.75 higher than the second."""
    folder = tmp_path / "run"
    options = ["conditional=true", "data=moons", "objective=energy", "num_samples=0", "trainer.steps=60"]
    options += ["trainer.batch_size=64", "trainer.checkpoint_every=60", "trainer.ema_decay=0.9", "trainer.warmup=5"]
    options += ["trainer.learning_rate=1e-2", f"hydra.run.dir={folder}"]
    status, _, err = run("train", *TINY, *options)
    assert status == 0, err
    last, heights = f"checkpoint={folder}/checkpoints/last", []
    for label in (0, 1):
        out = tmp_path / str(label)
        assert run("sample", last, "num_samples=200", f"label={label}", f"hydra.run.dir={out}")[0] == 0
        heights.append(float(np.load(out / "samples.npz")["points"][:, 1].mean()))
    high, low = heights
    assert high - low > 0.3
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
    (["objective.features=halves"], "features is 'halves', expected a function"),
    (["heads=2"], "a one-step generator has no heads, but heads=2 was given"),
    (["model.heads=2"], "the network's output has shape (1, 2, 8, 8), expected (1, 1, 8, 8)"),
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
    source = "seen = set()\n\ndef halves(x):\n    seen.add(len(x))\n    return x.flatten(1)[:, ::2]\n"
    module("own_features", source)
    options = ["objective.features=own_features.halves", "num_samples=0", "trainer.steps=2"]
    status, _, err = run("train", *TINY, *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert status == 0, err
    assert sys.modules["own_features"].seen >= {24, 16}  # of samples and data


@pytest.mark.slow
def test_two_processes_train_one_generator(tmp_path):
    """The network runs twice in each step, once without gradients."""
    folder = tmp_path / "run"
    options = [*TINY, "num_samples=0", "trainer.devices=2", f"hydra.run.dir={folder}"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6]
