"""Compiling a C or C++ file of the package with the system's compiler, and loading it.

The library is kept for the next process, under a name made of the source, the compiler and the CPU, so
that a home which machines of several kinds share is safe. Ranks that start together may all compile it:
each renames a file of its own to that name, and any of them will do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distnorm.kernels import child

_LOG = logging.getLogger("distnorm")
_TIMEOUT = 180.0  # seconds


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a file is compiled.

    Args:
        source: the file.
        variable: of the environment, which names the compiler.
        compiler: where it doesn't.
        flags: before the source.
        libraries: after it.
        facts: what else the library depends on, such as the version of headers.
    """

    source: Path
    variable: str
    compiler: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


class CompileError(Exception):
    """The library can't be had here; the message says why."""


def load(recipe: Recipe, kind: type[ctypes.CDLL] = ctypes.CDLL, *, compiles: bool = True) -> ctypes.CDLL:
    """Load the compiled form of a file, compiling it first if no process did before.

    Args:
        recipe: which file, and how.
        kind: `ctypes.PyDLL` for what needs the GIL.
        compiles: whether to compile it, which can take seconds.

    Raises:
        CompileError: there is no compiler, it failed, or nothing may be written or loaded here.
    """
    if os.name != "posix":
        raise CompileError(f"{os.name} is not POSIX")
    compiler = shlex.split(os.environ.get(recipe.variable) or recipe.compiler)
    found = shutil.which(compiler[0]) if compiler else None
    if found is None:
        name = compiler[0] if compiler else ""
        raise CompileError(f"there is no compiler {name!r}; install one, or set {recipe.variable} to yours")
    features = _cpu_features()
    path = _cache() / f"{recipe.source.stem}-{_ident(recipe, compiler, found, features)}.so"
    with suppress(OSError):
        _require_private(path.parent)
        if _only_ours(path):
            return kind(str(path))
    if not compiles:
        raise CompileError(f"{recipe.source.name} has not been compiled yet")
    build = _Build(recipe, compiler, kind, features)
    try:
        return build.into(path)
    except child.ProcessEndsError as error:
        raise CompileError(str(error)) from error
    except OSError as error:  # a directory that is read-only, full, not ours, or mounted noexec
        if isinstance(error, _SharedFolderError):
            _warn(f"{error}; so compiled code is neither loaded from there nor kept there")
        return build.for_this_process(path.name)


def load_in_turn(recipe: Recipe, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    """`load`, after other processes of this machine that do so: what takes one of them long is there then.

    Raises:
        CompileError: as `load`.
    """
    with ExitStack() as held:
        with suppress(OSError, ImportError):
            from fcntl import LOCK_EX, flock

            lock = _lock_of(recipe)
            held.callback(os.close, lock)
            flock(lock, LOCK_EX)
        return load(recipe, kind)


def _lock_of(recipe: Recipe) -> int:
    """A descriptor of the lock file, in a folder that is ours alone: others could put a link in its place."""
    folder = _cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in its place would not return
    lock = os.open(folder / f"{recipe.source.stem}.lock", flags, 0o600)
    if os.fstat(lock).st_uid != os.geteuid():  # its owner could hold it for ever
        os.close(lock)
        raise PermissionError(f"the lock in {folder} is another user's")
    return lock


def _cache() -> Path:
    """The folder itself: were it reached by a link, what was checked could be another than what is used."""
    # Not Path.resolve(), which raises a RuntimeError of its own for links in a circle before Python 3.13.
    if own := os.environ.get("DISTNORM_CACHE"):
        return Path(os.path.realpath(own))
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(
        os.path.realpath((Path(base) if base else Path(os.path.expanduser("~"), ".cache")) / "distnorm")
    )


def _cpu_features() -> str:
    """What Linux says the CPU can do; nothing elsewhere."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line
    return ""


def _ident(recipe: Recipe, compiler: list[str], found: str, features: str) -> str:
    """A file's size and time stand for the compiler's version: asking it takes longer than loading."""
    file = os.stat(found)
    version = (os.path.realpath(found), file.st_size, file.st_mtime_ns)
    how = (recipe.flags, recipe.libraries, recipe.facts)
    facts = repr((recipe.source.read_bytes(), compiler, how, version, platform.machine(), features))
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


class _SharedFolderError(PermissionError):
    """Others can put something into the folder, or another in its place."""


def _require_private(folder: Path) -> None:
    if not _only_ours(folder):
        raise _SharedFolderError(f"others may write to {folder}")
    for above in folder.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise _SharedFolderError(f"others may replace {folder}, since they may write to {above}")


def _only_ours(path: Path) -> bool:
    """Whether a path is this user's, and nobody else may write to it."""
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _warn(text: str) -> None:
    _LOG.warning(text)


@dataclass(frozen=True, slots=True)
class _Build:
    recipe: Recipe
    compiler: list[str]
    kind: type[ctypes.CDLL]
    features: str

    def into(self, path: Path) -> ctypes.CDLL:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(path.parent)
        with child.scratch(path.parent) as scratch:
            built = scratch / path.name
            self._compile(built)
            with built.open("rb") as file:  # a file cut short by a crash would be loaded, and end the process
                os.fsync(file.fileno())
            loaded = self.kind(str(built))
            os.replace(built, path)
        return loaded

    def for_this_process(self, name: str) -> ctypes.CDLL:
        try:
            with child.scratch() as scratch:
                built = scratch / name
                self._compile(built)
                return self.kind(str(built))
        except OSError as error:
            raise CompileError(str(error)) from error

    def _compile(self, built: Path) -> None:
        recipe, said = self.recipe, ""
        for machine in (["-march=native"], []) if self.features else ([],):
            inputs = [str(recipe.source), *recipe.libraries]
            command = [*self.compiler, *recipe.flags, *machine, "-o", str(built), *inputs]
            try:
                code, said = child.run(command, built.parent, _TIMEOUT)
            except TimeoutError as error:
                raise CompileError(f"{shlex.join(command)} took more than {_TIMEOUT:g} s") from error
            if code == 0 and built.exists():
                built.chmod(0o700)
                return
        raise CompileError(f"{shlex.join(command)} failed: {said[-500:]}")
