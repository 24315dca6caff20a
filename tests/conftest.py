"""What all tests share."""

import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diffusion.errors import UserError

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """The longest first, so that at the end no process waits for one."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Also in processes that tests start: threads that wait for each other take ten times as long on a busy machine.

    The tensors are small.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def user_error():
    """A context that expects a `UserError` of one line that names every given text."""

    @contextmanager
    def expect(*texts):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for text in texts:
            assert str(text) in message

    return expect


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("train", "option=value", ...) in an empty folder: exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(command, *options):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / f"{command}.py"), *options])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        status = 0
        capsys.readouterr()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def module(tmp_path):
    """module(name, source) writes a module of the user's own to where commands are run."""
    written = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)
