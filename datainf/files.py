"""Files that are whole or absent, however the process that writes them ends."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil


def fill_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file beside `path`, flush it to the disk, then give it its name in one step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fill(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`: whoever finds the file finds all of it."""
    fill_whole(path, lambda aside: aside.write_text(text, encoding="utf8"))


def remove_stale(folder: Path) -> None:
    """Remove the files that `fill_whole` was writing in `folder` when its process was killed."""
    for aside in folder.glob(".*.part"):
        process = aside.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            aside.unlink(missing_ok=True)
