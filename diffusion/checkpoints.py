"""Checkpoints: folders of safetensors and YAML that are whole or absent.

A checkpoint is written beside its place under a hidden name, flushed to disk, and renamed. A process killed at any
moment leaves the earlier checkpoint, which readers find even if it was killed between the two renames of `write`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from diffusion import specs
from diffusion.errors import UserError


@runtime_checkable
class Completing(Protocol):
    """A module that knows what older checkpoints of it lack."""

    def completed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


def write(folder: str | Path, description: Mapping, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `description` as checkpoint.yaml and each entry of `tensors` as NAME.safetensors into `folder`.

    Raises:
        UserError: nothing could be written (a full disk, say); an earlier checkpoint of that name is untouched.
    """
    name, folder = folder, Path(folder).absolute()
    fresh, earlier = folder.with_name(f".{folder.name}.new"), _earlier(folder)
    try:
        if earlier.exists() and not folder.exists():  # a process was killed between the two renames below
            earlier.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file, entries in tensors.items():
            # Bytes first: a failed write then is an OSError of ours, with its errno.
            plain = {key: value.detach().cpu().contiguous().clone() for key, value in entries.items()}
            _flush(fresh / f"{file}.safetensors", safetensors.torch.save(plain))
        # The last line shows readers that none is missing.
        content = yaml.safe_dump({**description, "complete": True}, sort_keys=False)
        _flush(fresh / "checkpoint.yaml", content.encode())
        shutil.rmtree(earlier, ignore_errors=True)
        if folder.exists():
            folder.rename(earlier)
        fresh.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"cannot save checkpoint {name}: {error.strerror}; earlier checkpoints are kept") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flush(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _earlier(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.old")


def exists(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint that was written to the end."""
    folder = Path(folder)
    return any((place / "checkpoint.yaml").is_file() for place in (folder, _earlier(folder)))


def read_description(folder: str | Path) -> dict:
    """The contents of checkpoint.yaml.

    Raises:
        UserError: there is no checkpoint, or its YAML is damaged.
    """
    path = _resolve(folder) / "checkpoint.yaml"
    try:
        description = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"checkpoint file {path} is damaged ({_one_line(error)}); use another checkpoint") from error
    if not isinstance(description, dict) or description.pop("complete", None) is not True:
        raise UserError(f"checkpoint file {path} is damaged (its end is missing); use another checkpoint")
    return description


def read_step(folder: str | Path) -> int:
    """The step of training at which a checkpoint was written.

    Raises:
        UserError: it was not written by training.
    """
    step = read_description(folder).get("step")
    if not isinstance(step, int):
        raise UserError(f"checkpoint {folder} holds no training state; resume from one written by train.py")
    return step


def read_tensors(folder: str | Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, on the CPU.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    path = _resolve(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"checkpoint {folder} has no file {path.name}; expected one written by train.py")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint file {path} is damaged ({_one_line(error)}); use another checkpoint") from error


def _resolve(folder: str | Path) -> Path:
    folder = Path(folder)
    for place in (folder, _earlier(folder)):
        if (place / "checkpoint.yaml").is_file():
            return place
    if (folder / "checkpoints" / "last").is_dir():
        raise UserError(f"{folder} is a run, not a checkpoint; use {folder / 'checkpoints' / 'last'}")
    raise UserError(f"no checkpoint at {folder}; expected a folder such as outputs/.../checkpoints/last")


def copy(folder: str | Path, other: str | Path) -> None:
    """Copy a checkpoint, whole or not at all."""
    tensors = {path.stem: read_tensors(folder, path.stem) for path in _resolve(folder).glob("*.safetensors")}
    write(other, read_description(folder), tensors)


def load_weights(module, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Copy `weights` into `module`.

    Raises:
        UserError: they belong to another architecture; the message names the first difference.
    """
    own = module.state_dict()
    if isinstance(module, Completing):
        weights = module.completed(weights)
    for key in [*own, *weights]:
        have, want = (tuple(d[key].shape) if key in d else "nothing" for d in (weights, own))
        if have != want:
            raise UserError(
                f"checkpoint {folder} is of another architecture: it holds {have} for {key}, this model {want}; "
                "use the model options that it was trained with"
            )
    module.load_state_dict(dict(weights))


def restore(
    folder: str | Path,
    kinds: tuple[type, ...],
    device: torch.device | str = "cpu",
    trust: str | Sequence[str] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> Any:
    """The generator of a checkpoint, one of `kinds`, with its weights, in evaluation mode.

    Args:
        trust: modules besides this package that the checkpoint may name, see `specs.build`.
        parts: arguments of it that no file can hold.

    Raises:
        UserError: there is no checkpoint, it is damaged, it is of something else, or it names what is neither part of
            this package nor of `trust`.
    """
    spec, parts = read_description(folder).get("model"), dict(parts or {})
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(spec, dict) or not spec:
        raise UserError(f"checkpoint {folder} does not describe a model; expected one written by train.py")
    missing = [name for name, value in spec.items() if value is None and name not in parts]
    if missing:
        raise UserError(
            f"checkpoint {folder} could not store its {missing[0]}; pass {wanted}.load(..., {missing[0]}=...)"
        )
    found = specs.build(spec | parts, trust)
    if not isinstance(found, kinds):
        raise UserError(f"checkpoint {folder} holds a {type(found).__name__}, expected a {wanted}")
    load_weights(found, read_tensors(folder, "model"), folder)
    return found.to(device).eval().requires_grad_(False)
