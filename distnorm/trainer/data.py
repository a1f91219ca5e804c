"""Text as bytes, and the global batch of every step as a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from distnorm import Config, RunError
from distnorm.trainer.seeds import generator

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Text:
    """The training text, and the batches drawn from it.

    Args:
        config: `train.data`, `train.model.context` and `train.seed` are read.

    Raises:
        RunError: the text can't be read, or is shorter than one sequence.
    """

    def __init__(self, config: Config) -> None:
        train = config.train
        self.context = train.model.context
        self.batch_size = train.data.batch_size
        self.seed = train.seed
        content, self.source = _read(train.data.path)
        if len(content) <= self.context:
            raise RunError(
                f"train.data.path: expected more than train.model.context = {self.context} bytes of text, "
                f"found {len(content)} in {self.source}"
            )
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.content = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """One of `parts` equal, contiguous slices of a step's global batch.

        Returns:
            Inputs and targets, int64 of shape (batch_size / parts, context), on CPU.
        """
        dice = generator(self.seed, f"step {step}")
        starts = torch.randint(len(self.content) - self.context, (self.batch_size,), generator=dice)
        starts = starts.chunk(parts)[part]
        rows = self.content[starts[:, None] + torch.arange(self.context + 1)].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _read(path: str | os.PathLike[str] | None) -> tuple[bytes, str]:
    """The text and what to call it in a message."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files, source = sorted(_library_files(root)), f"the Python standard library in {root}"
    else:
        root = Path(path).expanduser()
        source = str(root)
        # Hidden files are left out: an editor's or a file manager's, not text.
        files = (
            sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith("."))
            if root.is_dir()
            else [root]
        )
    try:
        return b"".join(file.read_bytes() for file in files), source
    except OSError as error:
        raise RunError(f"train.data.path: expected a readable file or folder, found {error}") from error


def _library_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
