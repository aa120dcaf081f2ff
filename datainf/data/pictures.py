"""Where the pictures of an image task come from: built in, a folder, or the hub. None is opened before it is drawn."""

import os
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
from datasets import Dataset
from PIL import Image

from datainf.data.built_in import scenes
from datainf.data.built_in.things import SUBJECTS
from datainf.data.tables import json_lines, table
from datainf.errors import InputError

# The three datasets of the paper's style task, as `datasets.load_dataset` takes them. The second one is a loading
# script, which it no longer runs; the hub keeps the same pictures as plain files on a branch of their own.
PAPER_STYLES = {
    "cartoon": {"path": "Norod78/cartoon-blip-captions"},
    "pixelart": {
        "path": "jainr3/diffusiondb-pixelart",
        "data_dir": "2k_random_1k",
        "revision": "refs/convert/parquet",
    },
    "line_sketch": {"path": "zoheb/sketch-scene"},
}
PAPER_SUBJECTS = "google/dreambooth"
# What the hub's dataset does not say: the class of a subject, where it is not its name without digits (from the
# dataset's prompts_and_classes.txt).
KINDS = {
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "colorful_sneaker": "sneaker",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "wolf_plushie": "stuffed animal",
}
MAX_SCENES = 10_000  # of each style: there are more captions, but drawing new ones gets slow
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """A picture that has not been opened yet.

    Attributes:
        name: what messages call it.
        paint: gives the picture; the size is a wish that only painted ones can fulfil.
        text: what the prompt says: the caption of a picture in a style, the kind of a subject.
        split: train or test where the source says it, else empty.
    """

    name: str
    paint: Callable[[int], Image.Image]
    text: str
    split: str = ""


Pool = dict[str, list[Picture]]  # class -> its pictures


def pool_of(task: str, per_class: int, seed: int) -> tuple[Pool, bool]:
    """The pictures of a task, and whether its classes are styles (else subjects)."""
    if task == "demo-style":
        return _demo_styles(per_class, seed), True
    if task == "demo-subject":
        return _demo_subjects(per_class, seed), False
    if task == "styles":
        rows = {style: _from_hub(task, **where) for style, where in PAPER_STYLES.items()}
        return {style: list(_hub_pictures(task, found)) for style, found in rows.items()}, True
    if task in ("dreambooth", PAPER_SUBJECTS):
        return _hub_subjects(task), False
    folder = Path(os.path.expanduser(task))
    if (folder / "metadata.jsonl").is_file():
        return _styles_in(folder), True
    if folder.is_dir():
        return _subjects_in(folder), False
    if task.startswith((".", "/", "~")):
        raise InputError(
            f"There is no folder {task}: give a folder of pictures with metadata.jsonl, a folder with one folder of "
            f"pictures for each subject, a dataset of the hub, or a built-in task (demo-style, demo-subject)."
        )
    return _hub_styles(task), True


def _demo_styles(per_class: int, seed: int) -> Pool:
    """Scenes of the project's own; no caption comes twice, and none is part of what the demo base was trained on."""
    if per_class > MAX_SCENES:
        raise InputError(f"demo-style has {MAX_SCENES} pictures of each style: n_train + n_test must not exceed that.")
    rng = random.Random(f"styles {seed}")
    drawn: dict[str, scenes.Scene] = {}
    while len(drawn) < per_class * len(scenes.STYLES):
        scene = scenes.scene(rng)
        if not scenes.in_corpus(scene.caption):
            drawn.setdefault(scene.caption, scene)
    queue = iter(drawn.values())
    return {
        style: [Picture(scene.caption, partial(paint, scene), scene.caption) for scene in islice(queue, per_class)]
        for style, paint in scenes.STYLES.items()
    }


def _demo_subjects(per_class: int, seed: int) -> Pool:
    """The project's own subjects, each of them as often as wanted in ever new poses and places."""
    rng = random.Random(f"subjects {seed}")
    return {
        subject: [
            Picture(subject, partial(scenes.plain, scenes.portrait(kind, look, rng)), kind) for _ in range(per_class)
        ]
        for subject, (kind, look) in SUBJECTS.items()
    }


def _styles_in(folder: Path) -> Pool:
    """The pictures that metadata.jsonl lists."""
    pool: Pool = {}
    for number, row in json_lines(folder / "metadata.jsonl").items():
        where = f"{folder / 'metadata.jsonl'}, line {number}"
        said = {column: str(value).strip() for column, value in row.items() if value is not None}
        style = said.get("style") or said.get("class")
        for column, value in (("file_name", said.get("file_name")), ("style", style), ("text", said.get("text"))):
            if not value:
                raise InputError(f"{where}: the {column} is missing; every picture needs file_name, style and text.")
        split = "train" if said.get("split") == "train" else "test" if said.get("split") else ""
        path = folder / said["file_name"]
        pool.setdefault(style, []).append(Picture(str(path), partial(_opened, path), said["text"], split))
    return pool


def _subjects_in(folder: Path) -> Pool:
    """The pictures in the folders of a folder."""
    kinds = _kinds_in(folder)
    pool: Pool = {}
    for subject in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        files = sorted(path for path in subject.glob("[!.]*") if path.suffix.lower() in IMAGE_FILES)
        kind = kinds.get(subject.name) or _kind_of(subject.name)
        if files:
            pool[subject.name] = [Picture(str(path), partial(_opened, path), kind) for path in files]
    return pool


def _kinds_in(folder: Path) -> dict[str, str]:
    """Subject -> kind, as subjects.tsv says; nothing where there is no such file."""
    path = folder / "subjects.tsv"
    if not path.is_file():
        return {}
    rows = table(path, "\t", quoted=False)
    for column in ("subject", "class"):
        if column not in rows:
            raise InputError(f"{path}: the column {column!r} is missing; there are {', '.join(rows)}.")
    return dict(zip(rows["subject"], rows["class"], strict=True))


def _kind_of(subject: str) -> str:
    return KINDS.get(subject, subject.rstrip(string.digits).replace("_", " ").strip())


def _from_hub(task: str, path: str, **where: str) -> Dataset:
    """All rows of a dataset on the hub."""
    try:
        splits = datasets.load_dataset(path, **where)
    except Exception as error:  # offline, no such dataset, files it cannot read: the same to the user
        raise InputError(
            f"There is no task {task!r}, neither built in (demo-style, demo-subject) nor a folder, and {path} cannot "
            f"be read from the hub ({type(error).__name__})."
        ) from error
    # A dataset of one split does not say what to test on.
    names = {name: "" if len(splits) == 1 else "train" if name == "train" else "test" for name in splits}
    return datasets.concatenate_datasets(
        [split.add_column("drawn_as", [names[name]] * len(split)) for name, split in splits.items()]
    )


def _hub_pictures(task: str, rows: Dataset) -> Iterator[Picture]:
    """The rows as pictures, none of them decoded."""
    caption = next((column for column in ("text", "prompt", "caption") if column in rows.column_names), None)
    if caption is None or "image" not in rows.column_names:
        raise InputError(f"{task} needs the columns image and text; there are {', '.join(rows.column_names)}.")
    for number, (text, split) in enumerate(zip(rows[caption], rows["drawn_as"], strict=True)):
        if not str(text or "").strip():
            raise InputError(f"{task}: the {caption} of example {number} is empty; every picture needs a caption.")
        yield Picture(f"{task}, example {number}", partial(_row, rows, number), text, split)


def _hub_styles(task: str) -> Pool:
    """The pictures of one dataset on the hub, which names their styles."""
    rows = _from_hub(task, task)
    column = next((column for column in ("style", "class") if column in rows.column_names), None)
    if column is None:
        raise InputError(f"{task} needs a column style or class; there are {', '.join(rows.column_names)}.")
    pool: Pool = {}
    for style, picture in zip(rows[column], _hub_pictures(task, rows), strict=True):
        pool.setdefault(str(style), []).append(picture)
    return pool


def _hub_subjects(task: str) -> Pool:
    """DreamBooth on the hub: every subject is a configuration of its own."""
    try:
        subjects = datasets.get_dataset_config_names(PAPER_SUBJECTS)
    except Exception as error:
        raise InputError(f"{PAPER_SUBJECTS} cannot be read from the hub ({type(error).__name__}).") from error
    pool: Pool = {}
    for subject in subjects:
        if subject != "default":  # all subjects once more
            rows = _from_hub(task, PAPER_SUBJECTS, name=subject)
            kind = _kind_of(subject)
            pool[subject] = [Picture(f"{subject} {n}", partial(_row, rows, n), kind) for n in range(len(rows))]
    return pool


def _opened(path: Path, _: int) -> Image.Image:
    return Image.open(path)


def _row(rows: Dataset, number: int, _: int) -> Image.Image:
    return rows[number]["image"]
