"""Files that are whole or absent, however the process that writes them ends."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil


def place(path: str | Path) -> Path:
    """A path as it was meant when it was given: ``~`` is the home folder, and a later change of the working directory
    does not move it."""
    return Path(path).expanduser().absolute()


def fill_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file in a folder beside `path`, flush it to the disk, then give it its name in one step.

    A folder, since `fill` may write aside too, as safetensors does, and be killed.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    folder.mkdir(exist_ok=True)
    aside = folder / path.name
    try:
        fill(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`: whoever finds the file finds all of it."""
    fill_whole(path, lambda aside: aside.write_text(text, encoding="utf8"))


def remove_stale(folder: Path) -> None:
    """Remove what `fill_whole` was writing in `folder` when its process was killed."""
    for aside in folder.glob(".*.part"):
        process = aside.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
