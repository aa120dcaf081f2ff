"""Notebook 40 by itself: what a user is refused, and the configurations of the larger scales on a small pipeline."""

import json

import nbformat
import pandas as pd
import pytest
from PIL import Image
from running import assert_refused, execute, of_scale

NAME = "40_image_identification"
SMALLEST = {
    **{"size": 16, "n_train": 3, "n_test": 1, "steps": 4, "batch_size": 4, "stability": 0, "inference_steps": 2},
    "timesteps": [25, 725],
}


@pytest.fixture
def styles(tmp_path):
    """A folder of two styles, four pictures each, as a user keeps them."""
    rows = []
    for style, colour in (("warm", (200, 80, 20)), ("cold", (20, 80, 200))):
        for place in range(4):
            name = f"{style}{place}.png"
            Image.new("RGB", (20, 20), tuple(value + 10 * place for value in colour)).save(tmp_path / name)
            rows.append({"file_name": name, "style": style, "text": f"thing {place}"})
    write_captions(tmp_path, rows)
    return tmp_path


def write_captions(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def damaged(folder, kind):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    if kind == "unreadable":
        (folder / rows[2]["file_name"]).write_text("no picture")
    if kind == "no caption":
        del rows[5]["text"]
    write_captions(folder, rows)


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        ("unreadable", {}, "warm2.png cannot be read as a picture: replace that file or leave it out."),
        ("no caption", {}, "line 6: the text is missing; every picture needs file_name, style and text."),
        ("", {"targets": ["q_proj"]}, "UNet2DConditionModel cannot carry a LoRA adapter on q_proj"),
        ("", {"n_train": 4}, "has 4 training and 0 test pictures, but 4 are wanted for training"),
        ("", {"model": "demo-llama"}, "InputError: The model 'demo-llama' "),
        ("", {"loss": "sum"}, "InputError: Unknown loss 'sum': choose one of mean, concat."),
        ("", {"timesteps": [1000]}, "InputError: timesteps must be among 0 to 999, not [1000]."),
    ],
)
def test_what_does_not_fit_an_image_run_ends_at_once_in_one_sentence(
    kind, given, sentence, styles, diffusion_base, tmp_path
):
    damaged(styles, kind)
    run = SMALLEST | {"model": diffusion_base, "task": str(styles)} | given
    assert_refused(sentence, NAME, tmp_path, **run)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_image_notebook_of_a_scale_runs_on_a_pipeline_in_the_hubs_format(scale, styles, diffusion_base, tmp_path):
    """As config/SCALE.yaml has it, but for the base, the pictures and their number and size, and the network of FID."""
    config = of_scale(scale, "images")
    smallest = {name: value for name, value in SMALLEST.items() if name not in ("timesteps", "batch_size")}
    given = {"model": diffusion_base, "task": str(styles), "inception": "", "cache": str(tmp_path / "cache")}
    execute(NAME, tmp_path, **(config | smallest | given | {"stability": 2, "output": str(tmp_path / "run.csv")}))
    record = pd.read_csv(tmp_path / "run.csv")
    assert set(record["loss"]) == {"mean", "concat"} and record["kind"].unique().tolist() == ["style_generation"]
    assert record["learning_rate"].unique().tolist() == [config["learning_rate"]]
    assert record["timesteps"].unique().tolist() == ["25+225+425+525+725+925"]
    executed = nbformat.read(tmp_path / f"{NAME}.ipynb", 4)
    assert sum("image/png" in o.get("data", {}) for cell in executed.cells for o in cell.get("outputs", [])) == 9
