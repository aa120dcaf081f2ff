"""Files that are whole or absent, however the process that writes them ends."""

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from datainf.errors import InputError

# What this computer is called, without dots, which part names in the name of a folder.
HOST = re.sub("[^a-zA-Z0-9_-]", "-", platform.node()) or "localhost"
OLD = 24 * 3600  # seconds; no file takes so long to write


def place(path: str | Path) -> Path:
    """A path as it was meant when it was given: ``~`` is the home folder, and a later change of the working directory
    does not move it.

    Raises:
        InputError: it begins with the name of a user, as in ~name, who has no home folder here.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"There is no home folder for the path {path}: write it out.") from error


def fill_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file in a folder beside `path`, flush it to the disk, then give it its name in one step.

    A folder, since `fill` may write aside too, as safetensors does, and be killed.
    """
    folder = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.part")
    folder.mkdir(exist_ok=True)
    aside = folder / path.name
    try:
        fill(aside)
        with open(aside, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`: whoever finds the file finds all of it."""
    fill_whole(path, lambda aside: aside.write_text(text, encoding="utf8", newline="\n"))


def remove_stale(folder: Path) -> None:
    """Remove what `fill_whole` was writing in `folder` when its process was killed.

    Of other hosts, which may share the disk, it is not known what is at work: theirs go once they are `OLD`.
    """
    for aside in folder.glob(".*.part"):
        host, process = aside.name.split(".")[-3:-1]
        is_gone = host == HOST and process.isdecimal() and not psutil.pid_exists(int(process))
        if is_gone or _last_written(aside) < time.time() - OLD:
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


def _last_written(folder: Path) -> float:
    """When something in the folder was last written; now, where it vanishes meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))
    except FileNotFoundError:
        return time.time()
