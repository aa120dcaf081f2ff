"""A path may begin with ~, whatever argument it is given to."""

import shutil

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoTokenizer

from datainf import demo
from datainf.data import glue, images, text
from datainf.errors import InputError
from datainf.evaluation import frechet
from datainf.models import lora
from datainf.study import provenance, results, sweep


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    return tmp_path


def test_datasets(home):
    rows = pd.DataFrame({"sentence": [f"a {i}" for i in range(8)], "label": [0, 1] * 4})
    texts = pd.DataFrame({"prompt": [f"p {i}" for i in range(8)], "response": "r", "class": list("ab") * 4})
    for folder in ("glue/mine", "text", "pictures"):
        (home / folder).mkdir(parents=True)
    for split in ("train", "validation"):
        rows.to_csv(home / "glue" / "mine" / f"{split}.tsv", sep="\t", index=False)
    for split in ("train", "test"):
        texts.to_json(home / "text" / f"{split}.jsonl", orient="records", lines=True)
    assert glue.load("~/glue/mine").name == "mine"
    assert text.load("~/text", n_train=2, n_test=1).name == "text"
    with pytest.raises(InputError, match="two classes of pictures are needed"):
        images.load("~/pictures", n_train=1, n_test=1, size=8)  # found, and empty
    assert sweep.dataset_in("~/glue", "mine") == "~/glue/mine"
    assert sweep.given("classification", {"DATA": "~/glue"}) == {"data": "~/glue"}
    with pytest.raises(InputError, match="There is no folder ~/nowhere, which IMAGES names"):
        sweep.given("images", {"IMAGES": "~/nowhere"})


def test_models_and_adapters(home, make_model):
    shutil.copytree(demo.BASE, home / "base")
    assert lora.from_pretrained(AutoTokenizer, "~/base").pad_token
    with pytest.raises(InputError, match="There is no folder ~/nowhere"):
        lora.from_pretrained(AutoTokenizer, "~/nowhere")
    model = make_model("roberta")
    model.save_pretrained(home / "adapter")
    assert isinstance(lora.load_adapter(make_model("roberta").unload(), "~/adapter"), PeftModel)
    with pytest.raises(InputError, match="There is no adapter in"):
        lora.load_adapter(model, "~/nowhere")


def test_the_weights_of_inception(home):
    pytest.importorskip("torch_fidelity", reason="needs the extra 'fid'")
    with pytest.raises(InputError, match="There is no file"):
        frechet.distance([], [], "~/nowhere")


def test_where_results_go(home):
    assert results.run_folder("~/cache", seed=1).parent == home / "cache"
    assert results.run_folder("cache", seed=1).parent == provenance.ROOT / "cache"
    rows = pd.DataFrame({name: ["x"] for name in results.RUN_COLUMNS})
    results.save_run("~/runs/approximation_error-x.csv", rows)
    assert len(results.load_runs("~/runs", "approximation_error")) == 1
