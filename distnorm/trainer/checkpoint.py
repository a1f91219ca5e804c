"""Save and load through torch.distributed.checkpoint, by whole-model names, so that any topology can go on.

A checkpoint that is loaded runs no code: tensors are read with ``weights_only``, and the metadata, which
torch reads with plain pickle, by an unpickler that knows the classes of metadata and nothing else.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from distnorm import GradClipper, RunError
from distnorm.trainer.engine import Engine
from distnorm.trainer.model import TIED_NAMES
from distnorm.trainer.rundir import CHECKPOINT_FILES, CHECKPOINTS_FOLDER

_METADATA_FILE, _STATE_FILE = CHECKPOINT_FILES

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def save_checkpoint(engine: Engine, optimizer: Optimizer, clipper: GradClipper, step: int) -> Path:
    """Write `<output_dir>/checkpoints/step-<step>`, which has this name only once it is whole. Collective.

    Raises:
        RunError: it can't be written.
    """
    world = engine.world
    final = Path(engine.config.train.output_dir, CHECKPOINTS_FOLDER, f"step-{step}")
    draft = final.with_name(final.name + ".partial")
    state = {"step": step, "clipper": clipper.state_dict(), "model": _model_facts(engine)}

    def prepare() -> None:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def publish() -> None:
        if world.rank == 0:
            written = BytesIO()
            torch.save(state, written)  # to a file it would say of a full disk only that it couldn't write
            (draft / _STATE_FILE).write_bytes(written.getvalue())
            shutil.rmtree(final, ignore_errors=True)
            draft.replace(final)

    try:
        with _as_run_error(f"checkpoint {final}: expected to write it, found"):
            world.together(f"checkpoint {final}", prepare)
            state_dict_saver.save(_tensors(engine, optimizer), storage_writer=FileSystemWriter(draft))
            world.together(f"checkpoint {final}", publish)
    except RunError as error:  # torch says of a full disk only that it couldn't write
        raise RunError(f"{error}; {world.gather(_room(draft))[0]}") from error  # before rank 0 makes room
    finally:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    return final


def load_checkpoint(path: Path, engine: Engine, optimizer: Optimizer, clipper: GradClipper) -> int:
    """Put a checkpoint's values in place, whatever topology saved it. Collective.

    Returns:
        The step after which it was saved.

    Raises:
        RunError: it can't be read, is of another model, or is made to run code.
    """
    world, what = engine.world, f"checkpoint {path}"
    state = world.together(what, lambda: _read_state(path, engine))
    _make_optimizer_state(engine, optimizer)
    with _as_run_error(f"{what}: expected to read it, found"):
        tensors = _tensors(engine, optimizer)
        state_dict_loader.load(tensors, storage_reader=_Reader(path), planner=_TensorPlanner())
        if _is_fsdp1(engine):
            _put_back(tensors, engine, optimizer)
    world.together(what, lambda: clipper.load_state_dict(state["clipper"]))
    return int(state["step"])


def _tensors(engine: Engine, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimizer's state: tensors only, since torch unpickles anything else."""
    if _is_fsdp1(engine):
        return _fsdp1_tensors(engine, optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.named_parameters().items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _is_fsdp1(engine: Engine) -> bool:
    return isinstance(engine.module, FullyShardedDataParallel)


def _fsdp1_tensors(engine: Engine, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of what FSDP1's flat parameters and their optimizer state hold, as DTensors by whole names."""
    model, states = _fsdp1_state(engine, optimizer)
    names = engine.named_parameters()  # a tied parameter has one of its names there
    tensors = {f"model.{name}": model[name] for name in names}
    for name in names:
        for key, value in states["state"].get(name, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _fsdp1_state(engine: Engine, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of FSDP1 as a whole
        return get_state_dict(engine.module, optimizer)


def _put_back(tensors: Mapping[str, Tensor], engine: Engine, optimizer: Optimizer) -> None:
    """Write copies that `_fsdp1_tensors` gave, with their new values, to where they are from."""
    model, states = _fsdp1_state(engine, optimizer)
    for name in engine.named_parameters():
        model[name] = tensors[f"model.{name}"]
        for key in states["state"].get(name, {}):
            states["state"][name][key] = tensors[f"optimizer.{name}.{key}"]
    first, second = TIED_NAMES
    if engine.config.train.model.tie_embeddings:
        model[second] = model[first]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        set_state_dict(engine.module, optimizer, model_state_dict=model, optim_state_dict=states)


def _room(folder: Path) -> str:
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(place).free:,} bytes are free there"


def _model_facts(engine: Engine) -> dict[str, object]:
    train = engine.config.train
    return {**train.model.model_dump(), "dtype": train.dtype, "optimizer": train.optimizer.name}


def _read_state(path: Path, engine: Engine) -> dict[str, Any]:
    try:
        state = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
        step, found = int(state["step"]), dict(state["model"])
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        found_instead = _first_line(error)
        raise RunError(f"checkpoint {path}: expected the trainer's state, found {found_instead}") from error
    expected = _model_facts(engine)
    for key in expected:
        if found.get(key) != expected[key]:
            raise RunError(f"checkpoint {path}: expected {key} {expected[key]}, found {found.get(key)}")
    return {**state, "step": step}


def _make_optimizer_state(engine: Engine, optimizer: Optimizer) -> None:
    """Let the optimizer make the state to load into, by a step that changes nothing else."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in engine.named_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _memory_format(kind: object, name: str) -> Any:
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"an attribute of {kind!r}, which is no part of metadata")
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # Python up to 3.11.3 names members of enums so
            return _memory_format
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name}, which is no part of metadata; it was not loaded")


class _Reader(FileSystemReader):
    """Reads a checkpoint's metadata without running any code that its file may name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _MetadataUnpickler(BytesIO(Path(self.path, _METADATA_FILE).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{type(metadata).__name__} in the place of metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorPlanner(DefaultLoadPlanner):
    """Loads tensors and refuses everything else."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} as an object; expected tensors only")


@contextmanager
def _as_run_error(prefix: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Without a process group there is nobody to save together with, and nothing to warn of.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:  # on every rank: torch gathers it
        rank, (cause, _) = min(error.failures.items())
        raise RunError(f"{prefix} on rank {rank}: {_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
