"""Image tasks, the pictures of the project's own making, and the script that trains a diffusion base on them."""

import json
import random
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from datainf.data import images
from datainf.data.built_in import scenes, things
from datainf.demo.train_diffusion import SIZE, TINTS, corpus, train_diffusion
from datainf.errors import InputError

SMALL = {"n_train": 4, "n_test": 2, "size": 32}


def array(picture):
    return np.asarray(picture, dtype=np.float32)


def pixels(split):
    return [picture.tobytes() for picture in split["image"]]


# Scenes.


@pytest.mark.parametrize("paint", [scenes.plain, *scenes.STYLES.values()])
@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_scene_is_painted_at_any_size(paint, size):
    picture = paint(scenes.scene(random.Random(1)), size)
    assert picture.size == (size, size) and picture.mode == "RGB"
    assert array(picture).std() > 20


def test_styles_look_as_their_names_say():
    some = [scenes.scene(random.Random(seed)) for seed in range(20)]
    for scene in some:
        sketch, blocks = array(scenes.line_sketch(scene, 32)), array(scenes.pixelart(scene, 32))
        assert (sketch == sketch[..., :1]).all() and np.median(sketch) == 255  # grey, and mostly paper
        assert set(np.unique(blocks)) <= {0, 85, 170, 255}
        assert (blocks[::2, ::2] == blocks[1::2, 1::2]).all()

    def saturation(paint):
        return np.mean([np.ptp(array(paint(scene, 32)), axis=-1).mean() for scene in some])

    assert saturation(scenes.cartoon) > 1.2 * saturation(scenes.plain)


def test_captions_name_what_is_in_the_picture():
    rng = random.Random(0)
    for _ in range(200):
        words = scenes.scene(rng).caption.split()
        assert sum(word in things.OBJECTS for word in words) in (1, 2)
        assert sum(word in things.COLOURS for word in words) in (1, 2)
    assert scenes.portrait("cat", things.SUBJECTS["cat"][1], rng).caption.startswith("a cat ")


# The built-in tasks.


@pytest.mark.parametrize("task", ["demo-style", "demo-subject"])
def test_built_in_tasks_are_balanced_unique_and_follow_from_the_seed(task):
    data = images.load(task, **SMALL, seed=3)
    assert data.train.column_names == data.test.column_names == ["image", "prompt", "class"]
    for split, each in ((data.train, 4), (data.test, 2)):
        assert split.to_pandas()["class"].value_counts().to_dict() == dict.fromkeys(data.classes, each)
        assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in split["image"])
    everything = pixels(data.train) + pixels(data.test)
    assert len(set(everything)) == len(everything)
    again, other = images.load(task, **SMALL, seed=3), images.load(task, **SMALL, seed=4)
    assert pixels(again.train) == pixels(data.train) and again.train["prompt"][:] == data.train["prompt"][:]
    assert again.revision == data.revision != other.revision
    assert not set(everything) & set(pixels(other.train))


def test_style_prompts_are_the_papers():
    data = images.load("demo-style", **SMALL)
    spoken = {"cartoon": "cartoon", "pixelart": "pixelart", "line_sketch": "black and white line sketch"}
    assert data.classes == tuple(spoken)
    for style, prompt in zip(data.train["class"], data.train["prompt"], strict=True):
        assert prompt.startswith(f"Generate an image in a specific {spoken[style]} style. a")
    prompts = [*data.train["prompt"], *data.test["prompt"]]
    assert len({prompt.partition(". ")[2] for prompt in prompts}) == len(prompts)


def test_every_subject_has_an_identifier_of_its_own():
    data = images.load("demo-subject", n_train=3, n_test=2, size=32)
    assert len(data.classes) == 12
    prompts = dict(zip(data.train["class"], data.train["prompt"], strict=True))
    assert len({prompt.lower() for prompt in prompts.values()}) == 12
    for subject, prompt in prompts.items():
        assert re.fullmatch(rf"a [A-Za-z0-9]{{5}} {things.SUBJECTS[subject][0]}", prompt)
    assert all(
        prompts[subject] == prompt for subject, prompt in zip(data.test["class"], data.test["prompt"], strict=True)
    )
    assert images.identifiers(["a", "b"], 0) != images.identifiers(["a", "b"], 1)


def test_pictures_of_a_subject_are_alike():
    """In the same pose and place two subjects of a class differ clearly; one subject's places and poses vary."""
    for (kind, look), (other_kind, other) in combinations(things.SUBJECTS.values(), 2):
        if kind == other_kind:
            twins = [scenes.plain(scenes.portrait(kind, each, random.Random(2)), 32) for each in (look, other)]
            assert np.abs(array(twins[0]) - array(twins[1])).mean() > 5


def test_the_base_was_not_trained_on_the_tasks():
    captions = [example.caption for example in corpus(300, 0)]
    style = images.load("demo-style", n_train=100, n_test=50, size=8)
    told = {prompt.partition(". ")[2] for prompt in [*style.train["prompt"], *style.test["prompt"]]}
    assert not told & {caption.rpartition(". ")[2] for caption in captions}
    names = " ".join(captions)
    assert not any(name in names for name in ("cartoon", "pixelart", "sketch"))
    assert all(f"a specific {name} style" in names for name in TINTS)


# Folders of one's own.


def write_styles(folder, rows, colours=((200, 0, 0), (0, 200, 0))):
    for row in rows:
        path = folder / row["file_name"]
        if row["file_name"] and not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (40, 20), random.Random(row["file_name"]).choice(colours)).save(path)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def style_rows(n=3, **more):
    return [
        {"file_name": f"{style}/{k}.png", "style": style, "text": f"thing {k}", **more}
        for style in "ab"
        for k in range(n)
    ]


def test_a_folder_of_styles(tmp_path):
    rows = style_rows(4)
    for number, row in enumerate(rows):
        row["split"] = "train" if number % 4 else "validation"
    data = images.load(write_styles(tmp_path, rows), n_train=3, n_test=5, size=16)
    assert data.classes == ("a", "b") and len(data.train) == 6
    assert sorted(data.test["prompt"]) == [f"Generate an image in a specific {s} style. thing 0" for s in "ab"]
    assert data.train[0]["image"].size == (16, 16)


def test_pictures_are_cut_to_the_middle(tmp_path):
    rows = style_rows()
    wide = Image.new("RGB", (60, 20), "blue")
    wide.paste("red", (20, 0, 40, 20))
    for row in rows:
        (tmp_path / row["file_name"]).parent.mkdir(exist_ok=True)
        wide.save(tmp_path / row["file_name"])
    data = images.load(write_styles(tmp_path, rows), n_train=2, n_test=1, size=20)
    assert (array(data.train[0]["image"]) == (255, 0, 0)).all()


def test_a_folder_of_subjects(tmp_path):
    for subject in ("dog", "dog2", "poop_emoji", "odd"):
        (tmp_path / subject).mkdir()
        for k in range(4):
            Image.new("L", (9, 12), 40 * k).save(tmp_path / subject / f"{k}.jpg")
    (tmp_path / "subjects.tsv").write_text("subject\tclass\nodd\tteapot\n")
    data = images.load(str(tmp_path), n_train=3, n_test=5, size=8)
    assert len(data.train) == 12 and len(data.test) == 4
    kind_of = dict(zip(data.train["class"], data.train["prompt"], strict=True))
    assert {s: p.split(" ", 2)[2] for s, p in kind_of.items()} == {
        "dog": "dog",
        "dog2": "dog",
        "poop_emoji": "toy",
        "odd": "teapot",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "line 1: the text is missing; every picture needs file_name, style and text."),
        ({"file_name": ""}, "line 1: the file_name is missing"),
        ({"style": None}, "line 1: the style is missing"),
        ({"style": "c"}, "the class 'c' has 1 training and 0 test pictures, but 2 are wanted for training"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_in_one_sentence(change, message, tmp_path):
    rows = style_rows()
    rows[0] |= change
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        images.load(write_styles(tmp_path, rows), n_train=2, n_test=1, size=8)
    assert "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_read_is_refused_by_name(tmp_path):
    folder = write_styles(tmp_path, style_rows())
    (tmp_path / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(InputError, match="a/1.png cannot be read as a picture: replace that file") as caught:
        images.load(folder, n_train=2, n_test=1, size=8)
    assert "\n" not in str(caught.value)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(InputError, match="a/1.png is missing"):
        images.load(folder, n_train=2, n_test=1, size=8)


@pytest.mark.parametrize("most", [40 * 20 - 1, 40 * 20 // 3])  # Pillow warns, Pillow refuses
def test_a_picture_of_too_many_pixels_is_refused_by_name(tmp_path, monkeypatch, most):
    folder = write_styles(tmp_path, style_rows(), colours=["red"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(InputError, match=rf"/\d.png has more than {most} pixels, which .*: scale it down or leave"):
        images.load(folder, n_train=2, n_test=1, size=8)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp"])
def test_a_picture_that_ends_too_early_is_refused_by_name(tmp_path, ending):
    for row in (rows := style_rows()):
        row["file_name"] = row["file_name"].replace("png", ending)
    folder = write_styles(tmp_path, rows)
    path = tmp_path / rows[0]["file_name"]
    for share in (0, 0.9):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(InputError, match=rf"a/0.{ending} cannot be read as a picture"):
            images.load(folder, n_train=2, n_test=1, size=8)


RED, GREEN, WHITE, CLEAR = (255, 0, 0), (0, 255, 0), (255, 255, 255), (9, 9, 9, 0)


def halves(mode, left, right):
    """A picture of two colours, side by side."""
    picture = Image.new(mode, (8, 8), left)
    picture.paste(right, (4, 0, 8, 8))
    return picture


def turned():
    """Red on the left once it is shown upright."""
    upright = Image.Exif()
    upright[0x0112] = 6
    return halves("RGB", RED, GREEN).rotate(90), {"exif": upright}


def palette():
    picture = halves("P", 1, 0)
    picture.putpalette([9, 9, 9, *RED])
    return picture, {"transparency": 0}


def sixteen_bits():
    return Image.fromarray(np.repeat([[0] * 4 + [0x8000] * 4], 8, axis=0).astype(np.uint16)), {}


SEEN = {
    "turned": (turned, "png", RED, GREEN),
    "opaque and clear": (lambda: (halves("RGBA", (*RED, 255), CLEAR), {}), "png", RED, WHITE),
    "half clear": (lambda: (halves("RGBA", (*RED, 128), CLEAR), {}), "png", (255, 127, 127), WHITE),
    "grey and clear": (lambda: (halves("LA", (7, 255), (7, 0)), {}), "png", (7, 7, 7), WHITE),
    "palette": (palette, "png", RED, WHITE),
    "sixteen bits": (sixteen_bits, "png", (0, 0, 0), (128, 128, 128)),
    "sixteen bits, tiff": (sixteen_bits, "tiff", (0, 0, 0), (128, 128, 128)),
    "ink": (lambda: (halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), {}), "tiff", RED, WHITE),
    "two colours": (lambda: (halves("1", 0, 1), {}), "bmp", (0, 0, 0), WHITE),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_picture_is_read_as_it_is_shown(tmp_path, kind):
    make, ending, left, right = SEEN[kind]
    rows = [{"file_name": f"{style}{k}.{ending}", "style": style, "text": "x"} for style in "ab" for k in range(2)]
    picture, options = make()
    for row in rows:
        picture.save(tmp_path / row["file_name"], **options)
    seen = images.load(write_styles(tmp_path, rows), n_train=1, n_test=1, size=8).train[0]["image"]
    assert seen.mode == "RGB" and [seen.getpixel((x, 4)) for x in (1, 6)] == [left, right]


def test_files_that_other_programs_hide_are_no_pictures(tmp_path):
    for subject in ("dog", "cat", ".ipynb_checkpoints"):
        (tmp_path / subject).mkdir()
        for k in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / subject / f"{k}.png")
            (tmp_path / subject / f"._{k}.png").write_bytes(b"what a Mac leaves")
    assert images.load(str(tmp_path), n_train=1, n_test=1, size=8).classes == ("cat", "dog")


def test_captions_keep_their_line_separators_and_classes_may_be_numbers(tmp_path):
    rows = style_rows(2)
    for row in rows:
        row |= {"style": "ab".index(row["style"]), "text": "one\u2028two \x85 three"}
    folder = write_styles(tmp_path, rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    data = images.load(folder, n_train=1, n_test=1, size=8)
    assert data.classes == ("0", "1") and data.train[0]["prompt"].endswith(" style. one\u2028two \x85 three")


def test_no_such_task_too_few_pictures_or_classes(tmp_path):
    with pytest.raises(InputError, match="There is no folder ./nowhere"):
        images.load("./nowhere", **SMALL)
    with pytest.raises(InputError, match="n_test must be at least 1, not 0"):
        images.load("demo-style", n_train=1, n_test=0, size=8)
    with pytest.raises(InputError, match="two classes of pictures are needed at least; there is none"):
        images.load(str(tmp_path), **SMALL)
    with pytest.raises(InputError, match="must not exceed that"):
        images.load("demo-style", n_train=10**6, n_test=1, size=8)
    folder = write_styles(tmp_path, style_rows())
    with pytest.raises(InputError, match="the class 'a' has 3 training and 0 test pictures, but 3 are wanted"):
        images.load(folder, n_train=3, n_test=1, size=8)
    write_styles(tmp_path, style_rows()[:3])
    with pytest.raises(InputError, match="two classes of pictures are needed at least; there is a"):
        images.load(folder, n_train=1, n_test=1, size=8)
    (tmp_path / "metadata.jsonl").write_text("file_name,style,text")
    with pytest.raises(InputError, match="metadata.jsonl, line 1 is not JSON"):
        images.load(folder, n_train=1, n_test=1, size=8)


def test_what_the_hub_does_not_have_is_said_in_one_sentence(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr("datasets.get_dataset_config_names", offline)
    for task in ("someone/styles", "styles", "dreambooth", "google/dreambooth"):
        with pytest.raises(InputError, match="from the hub") as caught:
            images.load(task, **SMALL)
        assert "\n" not in str(caught.value)


def test_datasets_of_the_hub(monkeypatch):
    """What the hub gives, played by small datasets with the same columns."""
    from datasets import Dataset, DatasetDict

    asked = []

    def load_dataset(path, name=None, **where):
        asked.append((path, name))
        rows = {"image": [Image.new("RGB", (9, 9), (k, len(asked), 0)) for k in range(5)]}
        if path != "google/dreambooth":
            rows["text"] = [f"caption {k}" for k in range(5)]
        return DatasetDict({"train": Dataset.from_dict(rows)})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda _: ["default", "dog6", "rc_car"])
    data = images.load("styles", n_train=3, n_test=2, size=8)
    assert data.classes == ("cartoon", "pixelart", "line_sketch") and len(data.train) == 9 and len(data.test) == 6
    assert [path for path, _ in asked] == [
        "Norod78/cartoon-blip-captions",
        "jainr3/diffusiondb-pixelart",
        "zoheb/sketch-scene",
    ]
    data = images.load("google/dreambooth", n_train=3, n_test=9, size=8)
    assert data.classes == ("dog6", "rc_car") and len(data.test) == 4
    assert {prompt.split()[-1] for prompt in data.train["prompt"]} == {"dog", "toy"}


def test_real_styles(real_data):
    data = images.load(str(real_data / "styles"), n_train=5, n_test=3, size=32)
    assert sorted(data.classes) == ["cartoon", "line_sketch", "pixelart"]
    assert len(data.train) == 15 and len(data.test) == 9
    assert all(picture.size == (32, 32) and picture.mode == "RGB" for picture in data.train["image"])


def test_real_subjects(real_data):
    data = images.load(str(real_data / "dreambooth"), n_train=3, n_test=9, size=32)
    assert len(data.classes) == 30 and len(data.train) == 90 and len(data.test) == 68
    assert len(set(data.train["prompt"])) == 30
    assert any(prompt.endswith(" stuffed animal") for prompt in data.train["prompt"])


# The script that trains a base.


def picture_of(pipeline, prompt):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, generator=generator).images[0]


def test_script_writes_a_pipeline_that_loads(tmp_path):
    train_diffusion(tmp_path, steps=2)
    made = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    assert picture_of(made, "a dog").size == (SIZE, SIZE)


def test_corpus_follows_from_the_seed():
    first, again, other = ([(e.picture.tobytes(), e.caption) for e in corpus(50, seed)] for seed in (0, 0, 1))
    assert first == again != other
