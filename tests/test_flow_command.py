"""scripts/flow.py, run as users run it."""

import json

import numpy as np
import pytest

QUICK = ["num_particles=40", "num_data=60", "frames=3", "flow.steps=4", "logger=none", "device=cpu"]


def folder(out):
    return next(line for line in out.splitlines() if line.startswith("particles: "))[11:].partition("/samples.png")[0]


def test_a_flow_on_digits_reports_its_fall_and_its_memory(run, tmp_path):
    status, out, err = run("flow", "flow=energy", "data=digits", *QUICK)
    assert status == 0, err
    assert "the functional fell" in out and "memorisation: " in out
    place = tmp_path / folder(out)
    names = {"config.yaml", "figures.json", "flow.gif", "functional.png", "metrics.jsonl", "samples.npz", "samples.png"}
    assert names <= {path.name for path in place.iterdir()}
    assert np.load(place / "samples.npz")["images"].shape == (40, 8, 8, 1)
    figures = json.loads((place / "figures.json").read_text())
    assert figures["step"] == [0, 2, 4] and figures["functional"][-1] < figures["functional"][0]
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_same_seed_gives_the_same_particles(run, tmp_path):
    points = []
    for seed in (0, 0, 1):
        place = tmp_path / f"run{len(points)}"
        options = [f"seed={seed}", "animation=false", f"hydra.run.dir={place}"]
        status, _, err = run("flow", "flow=langevin", *QUICK, *options)
        assert status == 0, err
        points.append(np.load(place / "samples.npz")["points"])
    assert np.array_equal(points[0], points[1]) and not np.array_equal(points[0], points[2])


def test_a_density_of_ones_own(run, module, tmp_path):
    module("well", "def log_prob(x):\n    return -50 * (x - 3).square().sum(1)\n")
    options = ["flow.functional.log_prob=well.log_prob", "flow.steps=100", "flow.step_size=0.005", "animation=false"]
    status, out, err = run("flow", "flow=langevin", *QUICK[:3], *QUICK[4:], *options)
    assert status == 0, err
    points = np.load(tmp_path / folder(out) / "samples.npz")["points"]
    assert np.abs(points.mean(0) - 3).max() < 0.1 and np.abs(points.std(0) - 0.1).max() < 0.05


def test_annealing_is_judged_by_the_last_level(run, tmp_path):
    """From far off its noise to close by: thousands of nats, not a few, as between the levels' own divergences."""
    options = ["flow=annealed", "num_particles=40", "num_data=60", "frames=3", "logger=none", "device=cpu"]
    status, out, err = run("flow", *options, "animation=false")
    assert status == 0 and "the functional fell" in out, err
    first, middle, last = json.loads((tmp_path / folder(out) / "figures.json").read_text())["functional"]
    assert middle > 100 and first > 1000 and last < 10


def test_steps_that_are_too_long_are_warned_of(run):
    with pytest.warns(UserWarning, match="the steps are too long: .* a step_size divided by"):
        status, out, err = run("flow", "flow=langevin", "flow.step_size=0.04", *QUICK[:3], *QUICK[4:], "flow.steps=30")
    assert status == 0 and "DID NOT FALL" in out, err


def test_a_density_that_is_not_finite_is_named(run, module):
    module("half", "def log_prob(x):\n    return x[:, 0].log() - x.square().sum(1)\n")
    status, _, err = run("flow", "flow=langevin", "flow.functional.log_prob=half.log_prob", *QUICK)
    assert status == 2 and err.startswith("error: the negative log-density is nan at particle "), err


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["num_particles=0"], ["num_particles is 0", "1 or more"]),
        (["flow.steps=0"], ["steps is 0", "1 or more"]),
        (["flow.step_size=-1"], ["step_size is -1", "positive"]),
        (["frames=1"], ["frames is 1", "at least 2"]),
        (["flow=gravity"], ["flow"]),
        (["flow=sinkhorn", "flow.functional.blur=-1"], ["blur is -1", "positive"]),
        (["flow=fdivergence", "flow.functional.kind=kl"], ["kl", "reverse_kl"]),
        (["flow=annealed", "flow.functional.checkpoint=nowhere"], ["nowhere"]),
        (["flow=langevin", "flow.step_size=10", "flow.steps=50"], ["particle", "smaller step_size"]),
    ],
    ids=lambda value: value[-1],
)
def test_what_is_wrong_is_one_line(run, options, texts):
    status, _, err = run("flow", *QUICK, *options)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    for text in texts:
        assert text in lines[0]
