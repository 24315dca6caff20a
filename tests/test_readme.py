"""What the README shows is true."""

import math
import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert "steps=1500" in code and "steps=18" in code
    quick = code.replace("steps=1500", "steps=2").replace("steps=18", "steps=3").replace("e-5", "e-1")
    (tmp_path / "example.py").write_text(quick)
    scope = runpy.run_path("example.py")
    assert scope["images"].shape == scope["velocity"].shape == (64, 1, 8, 8)


def test_field_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, *_ = blocks("py")
    (tmp_path / "example.py").write_text(code.replace("effort=0.1", "effort=0.02").replace("(1000)", "(100)"))
    assert runpy.run_path("example.py")["images"].shape == (16, 1, 8, 8)


def test_density_example_runs():
    _, code, *_ = blocks("py")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    (x,) = scope["grid"].grid
    assert float((scope["grid"].density[-1] - scope["series"].density(x[:, None])).abs().max()) < 1e-3


def test_flow_example_runs():
    *_, code, _ = blocks("py")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    energy = scope["EnergyDistance"](scope["data"])
    assert float(energy.value(scope["particles"])) < 0.1 * float(energy.value(scope["noise"]))
    assert float((scope["ring"].norm(dim=1) - 1).abs().mean()) < 0.3


def test_ordinary_functions_example_runs():
    *_, code = blocks("py")
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert float(scope["lowest"].abs().max()) < 1e-3
    assert float(scope["moved"].mean()) == pytest.approx(1 / (1 + math.e), abs=0.01)


def test_continuous_integration_runs_the_second_command():
    lines = (ROOT / ".ci" / "run").read_text().replace('bash -euo pipefail -c "$command"', "")
    printed = subprocess.run(
        ["bash", "-s"], input=lines.replace('"$0"', f'"{ROOT}/.ci/run"'), capture_output=True, text=True
    )
    assert printed.stdout.strip() == blocks("bash")[1].strip()


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
