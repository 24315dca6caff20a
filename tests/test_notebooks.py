"""Every notebook runs from top to bottom in this interpreter, and prints the figures that its text claims."""

import itertools
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def printed(name, folder):
    """Everything that the notebook prints, executed in a folder of its own; an error in a cell is an error here."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    # No folder of registered kernels: "python3" is then this interpreter and nothing else.
    kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    NotebookClient(notebook, km=kernel, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def numbers(text, pattern):
    """The numbers in the one line of `text` that fits `pattern`, where # stands for a number."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"([-+.\de]+)"), text)
    assert len(found) == 1, (pattern, text)
    return [float(number) for number in (found[0] if isinstance(found[0], tuple) else found)]


def first_steps(text):
    assert "velocity is x_t' = z: True" in text
    assert numbers(text, "largest |div u| / |grad u|: #")[0] < 1e-14
    assert "same samples: True" in text

    assert 0 < numbers(text, "median error of the learned velocity at t = 0.2: # %")[0] < 30

    # Heun(steps) costs 2 steps - 1 evaluations, and comes closer to the adaptive result with more of them.
    assert re.findall(r"Heun: (\d+) evaluations", text) == ["17", "35", "71"]
    assert numbers(text, "Adaptive: # evaluations")[0] < 71
    away = [float(distance) for distance in re.findall(r"Heun: .* median distance from Adaptive ([.\d]+)", text)]
    assert away[0] > 2 * away[1] > 4 * away[2] > 0

    real_distance, real_near = numbers(text, "held-out cities: energy distance #, near a city #")
    distance, near = numbers(text, "generator: energy distance #, near a city #")
    gaussian_distance, gaussian_near = numbers(text, "gaussian: energy distance #, near a city #")
    assert real_distance < distance < 0.3 * gaussian_distance
    assert gaussian_near + 0.3 * (real_near - gaussian_near) < near < real_near


def your_own_field(text):
    assert text.count("passed: True") == 1
    assert "right: failed nothing" in text
    assert "too fast: failed continuity (strong), continuity (weak)\n" in text
    assert "wrong exponent: failed sampler, prior\n" in text

    # 500 fair draws reach 316 of 500 points, give or take 7; all of them reach some point.
    _, largest = numbers(text, "distance from the nearest data point: median #, largest #")
    assert largest < 1e-3
    (reached,) = numbers(text, "of 500 data points, # were reached by 500 draws")
    assert 280 < reached < 350

    distance = "energy distance to the training data #"
    held_out, trained, barely = (
        numbers(text, f"{title}: {distance}")[0] for title in ("held-out data", "800 steps", "40 steps")
    )
    assert held_out < trained < 0.7 * barely

    # The longer training misses less of the flux, most plainly where the gaps between the arms are.
    tables = [part.partition("in standard errors")[0] for part in re.split(r"\d+ steps\n *time", text)[1:]]
    shares = [[float(share) for share in re.findall(r" ([.\d]+)%", table)] for table in tables]
    assert [len(column) for column in shares] == [10, 10]
    assert max(shares[1]) > 4 and max(shares[0]) < 0.5 * max(shares[1])
    assert tables[0].count("violated") < 0.5 * tables[1].count("violated")


def the_density(text):
    errors = [float(error) for error in re.findall(r"grid, \d+ cells: L1 error ([-+.\de]+)", text)]
    assert all(14 < coarse / fine < 18 for coarse, fine in itertools.pairwise(errors)) and len(errors) == 3
    assert all(float(figure) < 1e-12 for figure in re.findall(r"mass error ([-+.\de]+)", text))
    assert all(float(figure) >= 0 for figure in re.findall(r"least density ([-+.\de]+)", text))
    assert numbers(text, "basis, 101 functions: L1 error #, most negative #")[0] < 1e-9
    for t in ("0.5", "1.0"):
        mean, exact_mean, variance, exact_variance = numbers(text, f"t = {t}: mean # (exact #), variance # (exact #)")
        assert abs(mean - exact_mean) < 0.02 and abs(variance - exact_variance) < 0.02
    assert numbers(text, "right: largest of 24 residuals # standard errors")[0] < 4
    assert numbers(text, "5 % too strong: largest of 24 residuals # standard errors")[0] > 8
    terms = [line.split() for line in re.findall(r"^(?:f1|a): .*$", text, re.M)]
    for term, truth in zip(terms, (0, 4, 0, -4, 1), strict=True):
        value, error = float(term[2]), float(term[3])
        assert abs(value - truth) < 3 * error


def downhill(text):
    for name in ("energy distance", "Sinkhorn divergence"):
        first, last = numbers(text, f"{name}: # to # in")
        assert last < 0.02 * first
    for order in (1, 2, 4):
        error, ratio = numbers(text, f"order {order}: W2 error with 20 steps #, halving the steps divides it by #")
        assert 0.8 * 2**order < ratio < 1.3 * 2**order and error < 0.03
    least, most = numbers(text, "Langevin: shares of the modes from # to # (exact: 0.125)")
    assert least < 0.03 and most > 0.25
    least, most = numbers(text, "tempered: shares of the modes from # to # (exact: 0.125)")
    assert least > 0.07 and most < 0.19
    real, mine, noise = (
        numbers(text, f"{name}: energy distance #\n")[0] for name in ("held-out data", "one step", "noise")
    )
    assert real < noise and mine < 0.3 * noise
    own, held_out = numbers(text, "one step: # from 2000 training points, held-out points #")
    assert own > 0.7 * held_out


CLAIMS = [downhill, first_steps, the_density, your_own_field]


def test_every_notebook_has_claims_and_is_valid_and_small():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [claims.__name__ for claims in CLAIMS]
    for path in FOLDER.glob("*.ipynb"):
        nbformat.validate(nbformat.read(path, as_version=4))
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.__name__)
def test_it_runs_anywhere_and_prints_what_it_claims(claims, tmp_path):
    """In one test, so that processes that share the tests do not execute it twice."""
    claims(printed(f"{claims.__name__}.ipynb", tmp_path))
