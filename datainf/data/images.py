"""Image generation tasks: pictures in several styles, and pictures of several subjects (paper section 4.3, D.2)."""

import hashlib
import random
import string
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset
from PIL import Image, ImageOps

from datainf.data import revision_of
from datainf.data.pictures import Picture, pool_of
from datainf.errors import InputError

STYLE_PROMPT = "Generate an image in a specific {style} style. {text}"
SUBJECT_PROMPT = "a {identifier} {kind}"
# A style that the prompt calls by another name than the folder does.
SPOKEN = {"line_sketch": "black and white line sketch"}


@dataclass(frozen=True)
class ImageTask:
    """An image generation task of several classes: styles or subjects.

    Attributes:
        name: the task's short name.
        kind: style_generation or subject_generation, as the paper calls the two.
        classes: the names of its classes, in the order in which figures show them.
        train, test: datasets with the columns image (RGB, size x size), prompt and class.
        revision: which data: a hash of the pictures, prompts and classes in both splits.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    train: Dataset
    test: Dataset
    revision: str


def load(task: str, *, n_train: int, n_test: int, size: int, seed: int = 0) -> ImageTask:
    """Load a task and draw its training and test pictures by `seed`.

    Args:
        task: one of

            - `demo-style` or `demo-subject`, which are built in, `styles` or `dreambooth`, the paper's data on
              the hub (200 / 150 pictures of each style; 3 and the rest of each subject);
            - a folder of styles with ``metadata.jsonl`` (file_name, text, style or class, and split where it is
              fixed), or a dataset on the hub with the columns image, text, style or class;
            - a folder of subjects, one folder of pictures each, and where the folder's name is not what the prompt
              should say, ``subjects.tsv`` with the columns subject and class.
        n_train: training pictures of each class.
        n_test: at most this many test pictures of each class.
        size: pictures are cut to the square in their middle and scaled to this many pixels.

    Raises:
        InputError: no such task, a picture that cannot be read or has too many pixels, a caption missing, too few
            pictures, fewer than two classes, sizes out of range.
    """
    for name, number in (("n_train", n_train), ("n_test", n_test), ("size", size)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}.")
    pool, is_style = pool_of(task, n_train + n_test, seed)
    if len(pool) < 2:
        raise InputError(f"{task}: two classes of pictures are needed at least; there is {', '.join(pool) or 'none'}.")
    prompt = _style_prompt if is_style else partial(_subject_prompt, identifiers(list(pool), seed))
    drawn = {name: _split(task, name, pictures, n_train, n_test, seed) for name, pictures in pool.items()}
    splits = []
    for split in (0, 1):
        chosen = [(name, picture) for name, both in drawn.items() for picture in both[split]]
        random.Random(f"order {seed}").shuffle(chosen)
        rows = {
            "image": [_square(picture, size) for _, picture in chosen],
            "prompt": [prompt(name, picture.text) for name, picture in chosen],
            "class": [name for name, _ in chosen],
        }
        splits.append(rows)
    revision = revision_of(*(_fingerprints(rows) for rows in splits))
    train, test = (Dataset.from_dict(rows).cast_column("image", datasets.Image(mode="RGB")) for rows in splits)
    kind = "style_generation" if is_style else "subject_generation"
    return ImageTask(Path(task).name, kind, tuple(pool), train, test, revision)


def identifiers(subjects: list[str], seed: int) -> dict[str, str]:
    """A random string of five letters and digits for every subject, as in "a 5a2PZ dog"; no two the same.

    They differ in more than the case of letters, since the tokenizers of Stable Diffusion read lower case only.
    """
    rng = random.Random(f"identifiers {seed}")
    made: dict[str, str] = {}
    while len(made) < len(subjects):
        identifier = "".join(rng.choices(string.ascii_letters + string.digits, k=5))
        made.setdefault(identifier.lower(), identifier)
    return dict(zip(subjects, made.values(), strict=True))


def _style_prompt(style: str, text: str) -> str:
    return STYLE_PROMPT.format(style=SPOKEN.get(style, style.replace("_", " ")), text=text)


def _subject_prompt(identifier_of: dict[str, str], subject: str, kind: str) -> str:
    return SUBJECT_PROMPT.format(identifier=identifier_of[subject], kind=kind)


def _square(picture: Picture, size: int) -> Image.Image:
    """The square in the middle of the picture, RGB, size x size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _as_seen(picture.paint(size))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{picture.name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow takes for an attack: "
            "scale it down or leave it out."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as a picture"
        raise InputError(f"{picture.name} {problem}: replace that file or leave it out.") from error
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _as_seen(image: Image.Image) -> Image.Image:
    """The picture in RGB as it is shown: upright, and white where one sees through it."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which a conversion would take all above 255 for white
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _split(
    task: str, name: str, pictures: list[Picture], n_train: int, n_test: int, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """(train, test) pictures of one class, drawn by `seed`."""
    shuffled = random.Random(f"split {seed} {name}").sample(pictures, k=len(pictures))
    if any(picture.split for picture in pictures):
        train, test = ([p for p in shuffled if p.split == split] for split in ("train", "test"))
    else:
        train, test = shuffled[:n_train], shuffled[n_train:]
    if len(train) < n_train or not test:
        raise InputError(
            f"{task}: the class {name!r} has {len(train)} training and {len(test)} test pictures, but {n_train} are "
            f"wanted for training and at least 1 for the test; lower n_train or add pictures."
        )
    return train[:n_train], test[:n_test]


def _fingerprints(rows: dict[str, list]) -> Dataset:
    """The rows with a hash in place of each picture."""
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in rows["image"]]
    return Dataset.from_dict({**rows, "image": hashes})
