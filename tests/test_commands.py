"""The commands, as a user types them: what they write, and how they fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from PIL import Image

from diffusion import Generator
from diffusion.metrics import features
from diffusion.samplers import AdaptiveMultistep, Captured, Counted, Multistep, Tuned, generate

ROOT = Path(__file__).parents[1]
TINY = [
    "trainer.steps=6", "trainer.checkpoint_every=3", "trainer.log_every=2", "trainer.batch_size=16", "trainer.warmup=2",
    "model.channels=8", "sampler.steps=3", "device=cpu", "logger=none", "num_samples=0",
]  # fmt: skip
POINTS = [
    "data=8gaussians", "model=mlp", "model.width=16", "model.depth=1", "trainer.steps=3", "trainer.checkpoint_every=3",
    "trainer.log_every=2", "trainer.batch_size=16", "trainer.warmup=2", "sampler.steps=3", "device=cpu", "logger=none",
    "num_samples=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_classifier(monkeypatch):
    """What is printed and written, and not how good the features are, is in question here."""
    monkeypatch.setattr(features, "TRAINING_STEPS", 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a very short training, made by a real process."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, ROOT / "scripts" / "train.py", *TINY, "num_samples=60", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"run: {folder}"
    assert "images/s=" in done.stderr and "loss=" in done.stderr and "6/6" in done.stderr
    return folder


def test_train_writes_a_run(trained):
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml", "metrics.jsonl", "evaluation.json", "checkpoints", "samples.png", "samples.npz",
        "samples_0000003.png", "samples_0000006.png",
    }  # fmt: skip
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["field"] == {"_target_": "diffusion.fields.gravity", "dim": 64, "horizon": 80.0, "t_min": 0.002}
    assert config["model"]["shape"] == [1, 8, 8]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6]
    assert [row["step"] for row in rows if "test_loss" in row] == [3, 6]
    assert json.loads((trained / "evaluation.json").read_text())["generated"]["frechet"] > 0
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["best", "last"]
    assert sorted(path.name for path in (trained / "checkpoints" / "last").iterdir()) == [
        "checkpoint.yaml", "model.safetensors", "training.safetensors",
    ]  # fmt: skip


def test_sample_needs_the_checkpoint_alone(run, trained, tmp_path):
    options = [f"checkpoint={trained}/checkpoints/last", "num_samples=12", "device=cpu", "sampler.steps=4"]
    for name, more in {"a": [], "b": ["batch_size=5"], "c": ["seed=1"]}.items():
        status, out, _ = run("sample", *options, *more, f"hydra.run.dir={tmp_path / name}")
        assert status == 0
        assert f"{tmp_path / name}/samples.png" in out
    images = {name: np.load(tmp_path / name / "samples.npz")["images"] for name in "abc"}
    assert images["a"].shape == (12, 8, 8, 1) and images["a"].dtype == np.uint8
    assert np.array_equal(images["a"], images["b"])
    assert not np.array_equal(images["a"], images["c"])
    generator = Generator.load(trained / "checkpoints" / "last")
    from diffusion.data import to_uint8
    from diffusion.samplers import Heun

    direct = to_uint8(generator.sample(12, Heun(steps=4))).movedim(1, -1).numpy()
    assert np.array_equal(images["a"], direct)
    grid = Image.open(tmp_path / "a" / "samples.png")
    assert min(grid.size) >= 3 * 32


def test_every_sampler_runs_and_the_evaluations_are_reported(run, trained, tmp_path):
    checkpoint = f"checkpoint={trained}/checkpoints/best"
    for options, count in [
        (["sampler=heun", "sampler.steps=5"], "9 evaluations"),
        (["sampler=euler", "sampler.steps=5"], "5 evaluations"),
        (["sampler=adaptive", "sampler.rtol=0.1", "sampler.atol=0.1"], "evaluations"),
        (["sampler=adaptive", "sampler.method=rk4", "sampler.steps=3"], "13 evaluations"),
        (["sampler=multistep", "sampler.steps=4"], "4 evaluations"),
        (["sampler=multistep", "sampler.grid={_target_: diffusion.samplers.LogSNRGrid}"], "10 evaluations"),
        (["sampler=runge_kutta", "sampler.steps=3", "sampler.order=2"], "5 evaluations"),
        (["sampler=stochastic", "sampler.steps=4"], "7 evaluations"),
        (["sampler=euler_maruyama", "sampler.steps=4"], "4 evaluations"),
        (["sampler=predictor_corrector", "sampler.steps=4"], "7 evaluations"),
        (["sampler=churn", "sampler.steps=4"], "7 evaluations"),
        (["sampler=ancestral", "sampler.steps=4"], "4 evaluations"),
    ]:
        status, out, err = run("sample", checkpoint, "num_samples=2", *options)
        assert (status, err.count("error")) == (0, 0)
        assert count in out
    counted = Counted(Generator.load(trained / "checkpoints" / "best"))
    generate(counted, (4, 1, 8, 8), AdaptiveMultistep(0.01, 0.01))
    loose = ["sampler=adaptive_multistep", "sampler.rtol=0.01", "sampler.atol=0.01"]
    assert f"samples, {counted.points / 4:.4g} evaluations" in run("sample", checkpoint, "num_samples=4", *loose)[1]
    assert counted.points < 4 * counted.evaluations


def test_a_tuned_sampler_takes_the_evaluations_that_it_was_tuned_for(run, trained, tmp_path):
    shutil.copytree(trained / "checkpoints/last", tmp_path / "last")
    options = ["nfe=3", "trajectories=2", "rounds=1", f"hydra.run.dir={tmp_path}"]  # a folder that is not empty
    status, out, err = run("tune", f"checkpoint={tmp_path / 'last'}", *options)
    assert status == 0, err
    assert "3 evaluations: median error on fresh draws" in out
    choice = ["sampler=tuned", "sampler.nfe=3"]
    status, out, _ = run("sample", f"checkpoint={tmp_path / 'last'}", "num_samples=2", *choice)
    assert status == 0 and "3 evaluations each" in out


def test_a_sampler_that_does_not_suit_the_field_is_refused_before_training(run, tmp_path):
    status, out, err = run("train", *TINY, "model.heads=1", "sampler=stochastic", f"hydra.run.dir={tmp_path / 'run'}")
    assert status == 2 and "heads=2" in err
    assert "training in" not in out and not (tmp_path / "run" / "checkpoints").exists()


def test_evaluate_prints_a_table_and_writes_json(run, trained, tmp_path):
    status, out, _ = run(
        "evaluate", f"checkpoint={trained}/checkpoints/last", "num_samples=50", f"hydra.run.dir={tmp_path / 'e'}"
    )
    assert status == 0
    figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    for name in ("frechet", "kernel", "precision", "recall", "sliced_w2", "nearest_train", "memorised"):
        assert all(np.isfinite(figures[column][name]) for column in ("generated", "real", "gaussian"))
    assert figures["real"]["frechet"] < figures["gaussian"]["frechet"]
    assert "Frechet distance" in out and "gaussian" in out
    assert figures["num_samples"] == 50 and "Heun" in figures["sampler"]


def test_resumed_run_writes_the_same_metrics_and_weights(run, trained, tmp_path):
    folder = tmp_path / "outputs" / "run"
    options = [*TINY, f"hydra.run.dir={folder}"]
    assert run("train", *options, "trainer.learning_rate=1e-3")[0] == 0
    whole = (folder / "checkpoints" / "last" / "training.safetensors").read_bytes()
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 7, "lo']) + "\n")
    status, out, _ = run("train", *options, f"resume={trained}/checkpoints/best")
    assert status == 0 and f"continuing {trained}/checkpoints/best" in out
    assert (folder / "checkpoints" / "last" / "training.safetensors").read_bytes() == whole
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in rows]


def test_resume_auto_finds_the_newest_unfinished_run(run, tmp_path):
    first, second = tmp_path / "outputs" / "2020-01-01", tmp_path / "outputs" / "2020-01-02"
    status, out, _ = run("train", *TINY, "resume=auto", "trainer.steps=3", f"hydra.run.dir={first}")
    assert status == 0 and "starting afresh" in out
    status, out, _ = run("train", *TINY, "resume=auto", f"hydra.run.dir={second}")
    assert status == 0 and f"continuing {first}/checkpoints/last" in out
    status, out, _ = run("train", *TINY, "resume=auto", f"hydra.run.dir={tmp_path}/outputs/2020-01-03")
    assert status == 0 and "starting afresh" in out


def test_conditional_generator_takes_labels(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert run("train", *TINY, "conditional=true", f"hydra.run.dir={folder}")[0] == 0
    checkpoint = f"checkpoint={folder}/checkpoints/last"
    for label in ("3", "null"):
        assert run("sample", checkpoint, "num_samples=2", "sampler.steps=2", f"label={label}")[0] == 0
    status, _, err = run("sample", checkpoint, "num_samples=2", "label=10")
    assert status == 2 and "label is [10], but this generator expects a class from 0 to 9" in err
    drawn = []

    def tune(generator, draw, nfe, *args, **kwargs):
        drawn.append(draw(40, torch.Generator())[1]["label"])
        return Tuned(Multistep(nfe), 0.1, 0.2)

    monkeypatch.setattr("diffusion.samplers.tune", tune)
    assert run("tune", checkpoint, "nfe=3")[0] == 0
    assert drawn[0].bincount().tolist() == [4] * 10  # as many of each class


def test_points_are_trained_on_and_drawn(run, tmp_path):
    folder, small = tmp_path / "run", ["trainer.steps=4", "trainer.batch_size=64", "logger=none", "device=cpu"]
    options = ["experiment=toy2d_moons", *small, "sampler.steps=3", "num_samples=100", f"hydra.run.dir={folder}"]
    assert run("train", *options, "data.size=500")[0] == 0
    assert np.load(folder / "samples.npz")["points"].shape == (100, 2)


def test_wandb_gets_the_run_offline_without_asking(tmp_path):
    folder = tmp_path / "run"  # of points, for whose evaluation no classifier is trained
    options = [*POINTS, "data.size=300", "logger=wandb", "num_samples=60", f"hydra.run.dir={folder}"]
    fonts = {"MPLCONFIGDIR": matplotlib.get_configdir()}  # else matplotlib would look for all of them again
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **fonts}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", *options],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"test_loss" in content and b"images_per_second" in content and b"diffusion.fields.gravity" in content
    assert list((folder / "wandb").glob("offline-run-*/files/media/images/*.png"))


BAD_COMMANDS = [
    ("train", ["field=nonsense"], "curved gravity linear"),
    ("train", ["experiment=nonsense"], "digits_gravity"),
    ("train", ["trainer.stepz=3"], "unknown option trainer.stepz; expected one of: _target_, steps"),
    ("train", ["nonsense=3"], "unknown option nonsense; expected one of"),
    ("train", ["trainer.steps=-1"], "trainer.steps is -1, expected a positive number"),
    ("train", ["trainer.steps=many"], "trainer.steps is 'many', expected a value of type int"),
    ("train", ["sampler.steps=1"], "sampler has steps=1, expected at least 2"),
    ("train", ["sampler=adaptive", "sampler.method=nonsense"], "dopri5"),
    ("train", ["device=nonsense"], "device is 'nonsense', expected auto or one that this machine has"),
    ("train", ["field.dim=65"], "64 coordinates, but this field was built for dim=65"),
    ("train", ["data=array"], "data.path is missing; give data.path="),
    ("train", ["data=array", "data.path=nowhere.npz"], "nowhere.npz"),
    ("train", ["data=moons"], "UNet got data of shape (2,), expected images"),
    ("train", ["resume=nowhere"], "no checkpoint at nowhere"),
    ("train", ["conditional=true", "experiment=toy2d_cities"], "has no labels; use conditional=false"),
    ("sample", [], "checkpoint is missing; give checkpoint="),
    ("sample", ["checkpoint=nowhere"], "no checkpoint at nowhere"),
    ("sample", ["checkpoint=TRAINED", "num_samples=0"], "cannot draw 0 samples"),
    ("sample", ["checkpoint=TRAINED", "label=1"], "label is [1]"),
    ("sample", ["checkpoint=RUN"], "is a run, not a checkpoint"),
    ("sample", ["checkpoint=TRAINED", "trust=my_module.py"], "trust is 'my_module.py', expected the name of a module"),
    ("sample", ["checkpoint=TRAINED", "trust=3"], "trust is 3, expected the name of a module"),
    ("evaluate", ["checkpoint=TRAINED", "inception=true"], "Inception"),
    ("evaluate", ["checkpoint=nowhere"], "no checkpoint at nowhere"),
    ("evaluate", ["checkpoint=TRAINED", "data=moons"], "data moons has shape (2,), expected (1, 8, 8)"),
    ("evaluate", ["checkpoint=TRAINED", "num_samples=1"], "1"),
    ("evaluate", ["checkpoint=TRAINED", "likelihood=451"], "likelihood is 451, expected from 0 to 450 test points"),
    ("train", ["sampler=tuned"], "sampler=tuned is for a checkpoint that scripts/tune.py has tuned"),
    ("train", ["sampler=churn", "field=pfgmpp", "model.heads=1"], "train one with heads=2 (model.heads=2)"),
    ("sample", ["checkpoint=TRAINED", "sampler=multistep", "sampler.steps=2.5"], "steps=2.5, expected a whole number"),
    ("sample", ["checkpoint=TRAINED", "sampler=multistep", "sampler.order=7"], "order=7, expected 1, 2, 3 or 4"),
    ("sample", ["checkpoint=TRAINED", "sampler=churn", "sampler.highest=0"], "highest=0"),
    ("sample", ["checkpoint=TRAINED", "sampler=multistep", "sampler.grid=7"], "grid=7, expected a grid"),
    ("sample", ["checkpoint=TRAINED", "sampler=heun", "sampler.grid=null"], "grid=None, expected a grid"),
    ("sample", ["checkpoint=TRAINED", "sampler=stochastic", "sampler.grid=abc"], "grid='abc', expected a grid"),
    ("sample", ["checkpoint=TRAINED", "sampler=ancestral", "sampler.grid.rho=abc"], "rho='abc', expected a positive"),
    ("sample", ["checkpoint=TRAINED", "sampler=multistep", "sampler.std=abc"], "std='abc', expected a number or null"),
    ("sample", ["checkpoint=TRAINED", "sampler=multistep", "sampler.std=inf"], "std=inf, expected a positive number"),
    ("sample", ["checkpoint=TRAINED", "sampler=adaptive", "sampler.rtol=null"], "rtol=None, expected a number"),
    (
        "sample",
        ["checkpoint=TRAINED", "sampler=euler_maruyama", "sampler.noise=abc"],
        "noise is 'abc', expected a strength",
    ),
    ("sample", ["checkpoint=TRAINED", "sampler=churn", "sampler.inflate=-3"], "inflate=-3"),
    ("sample", ["checkpoint=TRAINED", "sampler=heun", "sampler.grid.rho=abc"], "rho='abc', expected a positive number"),
    ("sample", ["checkpoint=TRAINED", "num_samples=null"], "num_samples is null, expected a value of type int"),
    ("sample", ["checkpoint=TRAINED", "seed=99999999999999999999"], "expected a number below 2^63"),
    ("sample", ["checkpoint=TRAINED", "sampler=euler_maruyama", "sampler.noise=math.sqrt"], "noise g(t) fails"),
    ("sample", ["checkpoint=TRAINED", "sampler=adaptive", "sampler.rtol=-1"], "rtol=-1"),
    ("sample", ["checkpoint=TRAINED", "sampler=tuned", "sampler.nfe=3"], "not tuned for nfe=3 evaluations"),
    ("tune", [], "checkpoint is missing; give checkpoint="),
    ("tune", ["checkpoint=TRAINED", "nfe=1"], "nfe=1"),
    ("tune", ["checkpoint=TRAINED", "nfe=null"], "nfe is null, expected a value of type int"),
    ("train", ["seed=abc"], "seed is 'abc', expected a value of type int"),
    ("train", ["trainer.devices=abc"], "devices is 'abc', expected a value of type int"),
    ("train", ["num_samples=3"], "num_samples is 3, expected 0 or at least"),
    ("train", ["model.channels=0"], "UNet has channels=0"),
    ("train", ["resume=TRAINED", "field=linear"], "another architecture: model.field._target_ is"),
    ("sample", ["checkpoint=TRAINED", "num_samples=abc"], "num_samples is 'abc'"),
    ("sample", ["checkpoint=TRAINED", "label=a"], "label is 'a'"),
    ("sample", ["checkpoint=."], "no checkpoint at ."),
    ("train", ["validate=maybe"], "validate is 'maybe', expected a value of type bool"),
    ("train", ["field=radial", "field.cdf=tanh(r/u)"], "u"),
    ("train", ["field=radial", "field.cdf=r/t"], "expected a share between 0 and 1"),
    ("validate", ["data=8gaussians", "num_points=0"], "num_points is 0"),
    ("validate", ["data=8gaussians", "effort=0"], "effort 0, expected"),
    ("validate", ["data=8gaussians", "effort=many"], "effort"),
    ("validate", ["field=nonsense"], "curved gravity linear"),
    ("validate", ["field=own", "data=8gaussians"], "field._target_ is missing; give field._target_="),
    ("validate", ["data=8gaussians", "field.dim=3"], "2 coordinates, but this field was built for dim=3"),
    ("audit", [], "checkpoint is missing; give checkpoint="),
    ("audit", ["checkpoint=nowhere"], "no checkpoint at nowhere"),
    ("audit", ["checkpoint=TRAINED", "times=1"], "1 times"),
    ("audit", ["checkpoint=TRAINED", "draws=abc"], "draws is 'abc', expected a value of type int"),
    ("fokker_planck", ["frames=1"], "frames is 1, expected at least 2"),
    ("fokker_planck", ["problem=nonsense"], "banana double_well"),
    ("fokker_planck", ["problem=own"], "problem._target_ is missing; give problem._target_="),
    ("fokker_planck", ["problem.temperature=-1"], "temperature is -1"),
    ("fokker_planck", ["problem.barrier=abc"], "barrier is 'abc', expected a positive number"),
    ("fokker_planck", ["problem.dim=4"], "4 coordinates"),
    ("fokker_planck", ["problem.dim=4", "solver=galerkin"], "4 coordinates, test functions are for 1, 2 or 3"),
    ("fokker_planck", ["solver.cells=2"], "cells is 2, expected at least 3"),
    ("fokker_planck", ["solver=galerkin", "solver.order=0"], "order is 0"),
    ("fokker_planck", ["solver.tolerance=0"], "tolerance"),
    ("fokker_planck", ["solver=particles", "solver.number=10", "frames=2"], "take more particles"),
    ("audit", ["checkpoint=TRAINED", "data=moons"], "data moons has shape (2,), expected (1, 8, 8)"),
]


@pytest.mark.parametrize(("command", "options", "words"), BAD_COMMANDS, ids=lambda value: str(value)[:40])
def test_mistakes_end_in_one_line_and_status_2(run, trained, command, options, words):
    options = [
        option.replace("TRAINED", f"{trained}/checkpoints/last").replace("RUN", str(trained)) for option in options
    ]
    given = {option.split("=")[0] for option in options} | ({"model.channels"} if "model=mlp" in options else set())
    mlp = "data=moons" in options or any("toy2d" in option for option in options)
    given |= {"sampler.steps"} if any(option.startswith("sampler=") for option in options) else set()
    tiny = [option for option in TINY if option.split("=")[0] not in given and not (mlp and "model" in option)]
    tiny = tiny if command == "train" else []
    status, _, err = run(command, *tiny, *options)
    progress = ("step/s", "samples/s", "solutions/s", "Downloading")
    lines = [line for line in err.splitlines() if line.strip() and not any(word in line for word in progress)]
    assert status == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert words in lines[0]


OWN_FIELD = """
from collections.abc import Callable
from diffusion.fields import AffineField, StudentT

class Bent(AffineField):
    def __init__(self, dim: int, horizon: float, t_min: float, sigma: Callable):
        super().__init__(lambda t: t**0, sigma, StudentT(1.0, dim), horizon, t_min)

def bend(t):
    return t + t**2 / 1000
"""


def test_a_field_of_ones_own_is_trained_and_loaded_with_trust_alone(run, module, tmp_path):
    module("own_field", OWN_FIELD)
    folder = tmp_path / "run"
    own = ["field._target_=own_field.Bent", "+field.sigma=own_field.bend", f"hydra.run.dir={folder}"]
    assert run("train", *TINY, *own)[0] == 0
    last = f"checkpoint={folder}/checkpoints/last"
    stored = yaml.safe_load((folder / "checkpoints" / "last" / "checkpoint.yaml").read_text())["model"]["field"]
    assert stored == {
        "_target_": "own_field.Bent", "dim": 64, "horizon": 80.0, "t_min": 0.002,
        "sigma": {"_function_": "own_field.bend"},
    }  # fmt: skip
    sys.modules.pop("own_field")
    for command, options in (("sample", ["num_samples=2"]), ("evaluate", ["num_samples=50"])):
        for trust in ([], ["trust=other"], ["trust=[a,b]"]):
            status, _, err = run(command, last, *options, *trust)
            assert status == 2 and err.count("\n") == 1
            assert "the checkpoint names 'own_field.bend'" in err and "load with trust=own_field" in err
        assert "own_field" not in sys.modules
    assert run("sample", last, "num_samples=2", "sampler.steps=2", "trust=own_field")[0] == 0
    assert run("evaluate", last, "num_samples=50", "sampler.steps=2", "trust=[other,own_field]")[0] == 0
    assert run("train", *TINY, *own, f"resume={folder}/checkpoints/best")[0] == 0
    status, _, err = run("train", *TINY, *own[:1], "+field.sigma=own_field.bent")
    assert status == 2 and "own_field.py) has no 'bent'" in err and err.count("\n") == 1


def test_data_of_ones_own_need_trust_to_be_evaluated_on(run, module, trained, tmp_path):
    module("own_data", "from diffusion.data import digits\n\ndef mine():\n    return digits()\n")
    shutil.copytree(trained / "checkpoints" / "last", tmp_path / "last")
    path = tmp_path / "last" / "checkpoint.yaml"
    path.write_text(path.read_text().replace("diffusion.data.digits", "own_data.mine"))
    assert "own_data.mine" in path.read_text()
    status, _, err = run("evaluate", f"checkpoint={path.parent}", "num_samples=50", "sampler.steps=2")
    assert status == 2 and "'own_data.mine'" in err
    options = ["num_samples=50", "sampler.steps=2", "trust=own_data"]
    assert run("evaluate", f"checkpoint={path.parent}", *options)[0] == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "no module own_broken for 'own_broken.Field'"),
        ("def other(): pass", "own_broken.py) has no 'Field'"),
        ("x = 1\ny = undefined", "NameError: name 'undefined' is not defined (own_broken.py, line 2)"),
        ("def f(:", "cannot import own_broken: SyntaxError: invalid syntax (own_broken.py, line 1)"),
        ("import no_such_package", "cannot import own_broken: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)  # fmt: skip
def test_a_module_of_ones_own_that_cannot_be_imported_is_reported(run, module, source, words):
    if source is not None:
        module("own_broken", source)
    status, _, err = run("train", *TINY, "field._target_=own_broken.Field")
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("error: ") and words in err


def test_formulas_reach_options_as_they_are_typed(run):
    """Hydra has its own use of parentheses and of ^; what it can read stays as it is."""
    for formula in ("tanh((r/t)^2)", "1 - exp(-r/t)", "r^2/(r^2+t^2)", "gammainc(d/2, r^2/(2*t^2))", "min(r, t)"):
        status, _, err = run("train", *TINY, f"seed={formula}")
        assert status == 2 and f"seed is {formula!r}, expected" in err
    status, _, err = run("train", *TINY, "seed='a(b)'")
    assert status == 2 and "seed is 'a(b)', expected" in err
    status, _, err = run("train", *TINY, "seed=int(3.0)", "num_samples=3")
    assert status == 2 and "num_samples is 3" in err


QUICK = ["data=8gaussians", "effort=0.02", "num_points=100"]


def test_a_right_field_is_validated(run, tmp_path):
    status, out, err = run("validate", "field=gravity", *QUICK, f"hydra.run.dir={tmp_path / 'v'}")
    assert (status, err) == (0, "")
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    assert report["passed"] is True and report["failed"] == []
    names = [check["name"] for check in report["checks"]]
    assert names[:2] == ["continuity (strong)", "continuity (weak)"] and len(names) == 8
    assert all(name in out for name in names) and "FAIL" not in out
    assert f"{tmp_path / 'v'}/report.png" in out
    assert Image.open(tmp_path / "v" / "report.png").size > (1000, 300)


@pytest.mark.parametrize(
    ("options", "check"),
    [
        (["field=radial", "field.cdf=0.995 * tanh(r/t)"], "mass"),
        (["field=variance_exploding", "field.horizon=1"], "end"),
        (["field=gravity", "field.t_min=1"], "start"),
    ],
)
def test_a_wrong_field_ends_in_status_1_and_the_names_of_the_checks(run, tmp_path, options, check):
    status, out, err = run("validate", *options, *QUICK, f"hydra.run.dir={tmp_path / 'v'}")
    assert status == 1
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    assert report["passed"] is False and check in report["failed"]
    assert err == f"the field is wrong: {', '.join(report['failed'])}\n"
    assert f"{check} " in out and "FAIL" in out
    if "radial" not in options[0]:
        assert report["failed"] == [check]
        assert (tmp_path / "v" / "report.png").exists()


OWN_LAWS = """
import torch
from torch import Tensor
from diffusion.fields import Field

def psi(r, t):
    return 1 - torch.exp(-(r / t) ** 2 / 2)

class Spread(Field):
    rho = 7.0

    def __init__(self, factor: float = 1.0):
        self.horizon, self.factor = 80.0, factor

    def velocity(self, x: Tensor, t, x0: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return self.factor * (x - x0) / t

    def sample(self, x0: Tensor, t, generator=None) -> Tensor:
        z = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        return x0 + torch.as_tensor(t, dtype=x0.dtype).reshape(-1, *[1] * (x0.dim() - 1)) * z
"""


def test_a_law_of_ones_own_is_validated(run, module):
    module("own_law", OWN_LAWS)
    law = ["field=radial", "field.cdf=own_law.psi", "field.horizon=80", "field.t_min=0.002"]
    status, out, err = run("validate", *law, *QUICK)
    assert (status, err) == (0, "") and "FAIL" not in out


def test_a_field_of_ones_own_without_a_density_is_validated(run, module):
    """What it does not define is not checked, and said so; what it does is."""
    module("own_spread", OWN_LAWS)
    own = ["field=own", "field._target_=own_spread.Spread"]
    status, out, err = run("validate", *own, *QUICK)
    assert (status, err) == (0, "") and "not checked: Spread has no density" in out and "report.png" in out
    status, out, err = run("validate", *own, "+field.factor=0.8", *QUICK)
    assert status == 1 and err == "the field is wrong: continuity (weak)\n"


def test_nothing_is_trained_on_a_wrong_field(run, tmp_path):
    folder = tmp_path / "run"
    wrong = ["field=variance_exploding", "field.horizon=1", f"hydra.run.dir={folder}"]
    status, _, err = run("train", *POINTS, *wrong)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: the field is wrong: end: ") and "nats, expected at most 0." in err
    assert "validate=false" in err
    assert not folder.exists()
    assert run("train", *POINTS, *wrong, "validate=false")[0] == 0
    assert (folder / "checkpoints" / "last" / "model.safetensors").exists()


def test_a_law_that_cannot_be_drawn_from_is_refused_in_one_line_with_the_reason(run):
    status, _, err = run("train", *POINTS, "field=radial", "field.cdf=0.995 * tanh(r/t)")
    assert status == 2 and err.count("\n") == 1
    assert "mass: psi(r, t=" in err and "expected a CDF" in err
    assert "nan" not in err and "inf" not in err


@pytest.mark.parametrize(
    "field",
    [["field=stretched"], ["field=radial", "field.cdf=tanh((r/t)^2)", "field.horizon=200"]],
    ids=["stretched", "formula"],
)
def test_a_field_that_is_not_affine_is_trained_sampled_and_audited(run, tmp_path, field):
    folder = tmp_path / "run"
    assert run("train", *POINTS, *field, f"hydra.run.dir={folder}")[0] == 0
    last = f"checkpoint={folder}/checkpoints/last"
    drawn = ["num_samples=20", "sampler.steps=4", f"hydra.run.dir={tmp_path / 's'}"]
    assert run("sample", last, *drawn)[0] == 0
    points = np.load(tmp_path / "s" / "samples.npz")["points"]
    assert points.shape == (20, 2) and np.isfinite(points).all()
    status, _, _ = run("audit", last, "times=3", "draws=64", "functions=8", f"hydra.run.dir={tmp_path / 'a'}")
    assert status == 0
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert [row["time"] for row in found["times"]] == pytest.approx(
        Generator.load(folder / "checkpoints" / "last").field.clock(3).tolist()
    )


def test_audit_writes_a_table_a_file_and_a_picture(run, trained, tmp_path):
    options = ["times=3", "draws=100", "functions=8", f"hydra.run.dir={tmp_path / 'a'}"]
    status, out, err = run("audit", f"checkpoint={trained}/checkpoints/last", *options)
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found["checkpoint"] == f"{trained}/checkpoints/last"
    assert (found["draws"], found["functions"], len(found["times"])) == (100, 8, 3)
    assert "8 test functions, 100 draws a time" in out and f"{tmp_path / 'a'}/audit.png" in out
    assert Image.open(tmp_path / "a" / "audit.png").size > (800, 300)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.yaml"])
def test_truncated_checkpoint_is_named(run, trained, tmp_path, name):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (trained / "checkpoints" / "last").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) // 2] if path.name == name else content)
    status, _, err = run("sample", f"checkpoint={folder}")
    assert status == 2 and err.count("\n") == 1
    assert str(folder / name) in err


def test_a_run_without_a_score_goes_on_without(run, tmp_path):
    """As those from before the score of its field was learned."""
    folder = tmp_path / "run"
    assert run("train", *TINY, "trainer.steps=3", "model.heads=1", f"hydra.run.dir={folder}")[0] == 0
    status, _, err = run("train", *TINY, f"resume={folder}/checkpoints/last", f"hydra.run.dir={folder}")
    assert status == 0, err
    assert Generator.load(folder / "checkpoints" / "last").heads == 1


@pytest.mark.parametrize(
    ("sampler", "number", "mode", "captured"),
    [
        ("Heun", 8, "reduce-overhead", False),
        ("Heun", 9, None, True),
        ("Adaptive", 9, "reduce-overhead", False),
        ("AdaptiveMultistep", 9, None, False),
    ],
)
def test_what_is_one_graph_on_cuda(sampler, number, mode, captured, monkeypatch):
    """The loop, for batches to come; else the network, if batches keep their size."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cli

    modes = []
    network = SimpleNamespace(compile=lambda mode: modes.append(mode))
    generator = SimpleNamespace(device=torch.device("cuda"), network=network)
    monkeypatch.setattr(cli.checkpoints, "restore", lambda *arguments: generator)
    monkeypatch.setattr(cli.devices, "pick", lambda device: device)
    options = {"checkpoint": "c", "device": "cuda", "trust": None, "compile": True, "num_samples": number}
    config = {**options, "batch_size": 8, "sampler": {"_target_": f"diffusion.samplers.{sampler}"}}
    _, found = cli.load(OmegaConf.create(config))
    assert (modes, isinstance(found, Captured)) == ([mode], captured)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"_target_": "diffusion.gradient_flow.Drifting", "kernel": "torch.exp"}, "missing 1 required .* 'data'"),
        (
            {
                "_target_": "diffusion.fokker_planck.ParticleSolver",
                "equation": {"_target_": "diffusion.fokker_planck.problems.double_well"},
                "hidden": [8],
                "nosuch": 1,
            },
            "unexpected keyword argument 'nosuch'",
        ),
    ],
    ids=["function", "list"],
)
def test_what_a_class_refuses_is_not_laid_to_options_that_are_right(options, reason, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import cli

    with pytest.raises(InstantiationException, match=reason):
        cli.build(OmegaConf.create(options))


def test_checkpoint_of_another_architecture_is_refused(run, trained):
    status, _, err = run("train", *TINY, "model.channels=16", f"resume={trained}/checkpoints/last")
    assert status == 2
    assert "is of another architecture" in err.splitlines()[-1] and "network" in err.splitlines()[-1]
    status, _, err = run(
        "train", *TINY, "model.multipliers=[1]", "model.attention=[]", f"resume={trained}/checkpoints/last"
    )
    assert status == 2 and "is of another architecture" in err.splitlines()[-1]


def test_data_files_with_mistakes_are_named(run, tmp_path):
    good = np.zeros((20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "float.npz", images=good.astype(np.float32))
    np.savez(tmp_path / "flat.npz", images=good[0])
    np.savez(tmp_path / "labels.npz", images=good, labels=np.arange(20) - 5)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "flat.npz").read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    for options, words in [
        (["data=array", "data.path=float.npz"], "float32"),
        (["data=array", "data.path=flat.npz"], "(8, 8)"),
        (["data=array", "data.path=labels.npz"], "-5"),
        (["data=array", "data.path=cut.npz"], "cut.npz"),
        (["data=image_folder", "data.path=empty", "data.size=8"], "empty"),
    ]:
        status, _, err = run("train", *TINY, *options)
        assert status == 2 and words in err and err.count("\n") == 1, err


def test_help_lists_the_choices(run):
    status, out, _ = run("train", "--help")
    assert status in (0, None)
    choices = sorted(path.stem for path in (ROOT / "conf" / "field").iterdir())
    assert f"field: {', '.join(choices)}" in out


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_identical_bits(tmp_path):
    """Three kill -9, then the rest: the same weights, averages and moments as a run in one piece."""
    import random
    import time

    options = ["trainer.steps=120", "trainer.checkpoint_every=10", "logger=none", "device=cpu", "num_samples=0"]

    def start(folder, *more):
        command = [sys.executable, ROOT / "scripts" / "train.py", *options, *more, f"hydra.run.dir={folder}"]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    assert start(tmp_path / "whole").wait() == 0
    for _ in range(3):
        process = start(tmp_path / "cut", "resume=auto")
        process.stdout.readline()  # it has begun
        time.sleep(random.uniform(2, 10))
        process.kill()
        process.wait()
    assert start(tmp_path / "cut", "resume=auto").wait() == 0
    for name in ("last", "best"):
        for file in ("model.safetensors", "training.safetensors"):
            whole, cut = (tmp_path / run / "checkpoints" / name / file for run in ("whole", "cut"))
            assert whole.read_bytes() == cut.read_bytes(), (name, file)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, ROOT / "scripts" / "train.py", *TINY, "trainer.devices=2", f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6]
    wrong = subprocess.run([*command, "trainer.batch_size=15"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
