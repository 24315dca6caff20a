"""Whole or absent, whatever happens."""

import os
import subprocess
import sys

import pytest
import torch

from diffusion import UserError, checkpoints

OLD, NEW = {"model": {"w": torch.zeros(1000)}}, {"model": {"w": torch.ones(1000)}}


def value(folder):
    return checkpoints.read_tensors(folder, "model")["w"][0].item()


def test_round_trip_keeps_bits_shapes_and_dtypes(tmp_path):
    tensors = {
        "a": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "b": torch.tensor(1.5, dtype=torch.float64),
        "c": torch.randn(4, dtype=torch.bfloat16),
    }
    shared = torch.randn(6)
    tensors |= {"d": shared[:3], "e": shared[3:]}
    checkpoints.write(tmp_path / "x", {"step": 3, "rate": 1e-3}, {"model": tensors})
    read = checkpoints.read_tensors(tmp_path / "x", "model")
    assert all(torch.equal(read[key], tensors[key]) and read[key].dtype == tensors[key].dtype for key in tensors)
    assert checkpoints.read_description(tmp_path / "x") == {"step": 3, "rate": 1e-3}


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process, for each moment a fork of one, exits hard in the middle of its `moment`-th operation on the disk."""
    script = """
import os, shutil, pathlib, torch
from diffusion import checkpoints

def save(moment):
    checkpoints.write("x", {"step": 1}, {"model": {"w": torch.zeros(1000)}})
    count = 0
    def counted(operation):
        def call(*args, **kwargs):
            nonlocal count
            if count == moment:
                os._exit(9)
            count += 1
            return operation(*args, **kwargs)
        return call
    os.fsync, shutil.rmtree = counted(os.fsync), counted(shutil.rmtree)
    pathlib.Path.rename = counted(pathlib.Path.rename)
    checkpoints.write("x", {"step": 2}, {"model": {"w": torch.ones(1000)}})

for moment in range(8):
    os.mkdir(str(moment))
    if not (child := os.fork()):
        os.chdir(str(moment))
        save(moment)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert [int(status) for status in done.stdout.split()] == 7 * [9] + [0], done.stderr
    for moment in range(8):
        folder = tmp_path / str(moment)
        assert checkpoints.exists(folder / "x")
        step = checkpoints.read_description(folder / "x")["step"]
        assert value(folder / "x") == {1: 0.0, 2: 1.0}[step]
        checkpoints.write(folder / "x", {"step": 3}, NEW)
        assert os.listdir(folder) == ["x"]


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """A real limit on the size of files stands in for the full disk: the same call fails, in the middle of a file."""
    script = """
import resource, torch
from diffusion import UserError, checkpoints
checkpoints.write("x", {"step": 1}, {"model": {"w": torch.zeros(1000)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoints.write("x", {"step": 2}, {"model": {"w": torch.ones(100_000)}})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "cannot save checkpoint x: File too large; earlier checkpoints are kept\n"
    assert value(tmp_path / "x") == 0.0
    assert os.listdir(tmp_path) == ["x"]


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "noise": os.urandom(500)}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "noise"])
def test_damaged_tensors_are_named(tmp_path, how):
    checkpoints.write(tmp_path / "x", {"step": 1}, OLD)
    damage(tmp_path / "x" / "model.safetensors", how)
    with pytest.raises(UserError, match=r"model.safetensors is damaged") as error:
        checkpoints.read_tensors(tmp_path / "x", "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["empty", "noise", "truncated"])
def test_damaged_description_is_named(tmp_path, how):
    checkpoints.write(tmp_path / "x", {"step": 1}, OLD)
    damage(tmp_path / "x" / "checkpoint.yaml", how)
    with pytest.raises(UserError, match=r"checkpoint.yaml is damaged") as error:
        checkpoints.read_description(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_missing_places_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere; expected a folder such as"):
        checkpoints.read_description(tmp_path / "nowhere")
    checkpoints.write(tmp_path / "checkpoints" / "last", {"step": 1}, OLD)
    with pytest.raises(UserError, match=r"is a run, not a checkpoint; use .*last"):
        checkpoints.read_description(tmp_path)
    with pytest.raises(UserError, match=r"has no file training.safetensors"):
        checkpoints.read_tensors(tmp_path / "checkpoints" / "last", "training")
