"""A dress rehearsal of the paper's scale: checkpoints of its three shapes with random weights, in the hub's format, and
every stage of its notebooks for a few steps, with the settings of config/paper.yaml.

python -m benchmarks.rehearsal                   # all of it on a large GPU; --only text: that notebook alone
python -m benchmarks.rehearsal --tiny            # toy shapes, on the CPU where there is no GPU

The data are the built-in tasks, so nothing is downloaded. The record has, for every stage,

    seconds            of the clock
    peak_gb            the most that the GPU (of a CPU, the notebook's process) held, whatever held it; as seen twice
                       a second for a whole notebook, and counted by torch, beyond what was held before, for a stage
    disk_gb            what the run left in its cache: adapter and gradients
    done, in_paper     how many examples the stage took here, and takes in a run of the paper
    paper_hours, paper_disk_gb   both at the paper's number of examples, for stages that grow in proportion
"""

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import papermill
import psutil
import torch
import yaml
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from benchmarks import common, gpu
from datainf import demo
from datainf.storage.memory import in_words
from datainf.study.provenance import ROOT


class Part(NamedTuple):
    """A notebook, where its settings stand, what stands in for its data and base, and how much of the paper's it is."""

    notebook: str
    section: str
    settings: Mapping[str, object]
    make: Callable[[Path, bool, torch.device], None]
    in_paper: int  # examples whose gradients one run of the paper takes, for each loss


def make_roberta(folder: Path, tiny: bool, device: torch.device) -> None:
    """RoBERTa-large; the built-in tokenizer's tokens are the first of its vocabulary."""
    AutoTokenizer.from_pretrained(demo.BASE).save_pretrained(folder)
    _made(gpu.roberta(tiny).base, torch.float32, device).save_pretrained(folder)


def make_llama(folder: Path, tiny: bool, device: torch.device) -> None:
    """Llama-2-13B, in bfloat16 on the disk."""
    tokenizer = AutoTokenizer.from_pretrained(demo.LLAMA)
    tokenizer.save_pretrained(folder)
    model = _made(gpu.llama(tiny).base, torch.bfloat16, device)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)


def make_diffusion(folder: Path, tiny: bool, device: torch.device) -> None:
    """Stable Diffusion 1.5: its UNet, autoencoder and text encoder."""
    channels, layers, heads = ((32,) * 4, 1, 2) if tiny else ((128, 256, 512, 512), 12, 12)
    pipeline = StableDiffusionPipeline.from_pretrained(demo.DIFFUSION)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with gpu.made_in(torch.float32, device):
        unet = gpu.unet(tiny).base()
        vae = AutoencoderKL(block_out_channels=channels, layers_per_block=2 - tiny, latent_channels=4, **blocks)
        text = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=unet.config.cross_attention_dim,
            intermediate_size=4 * unet.config.cross_attention_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            bos_token_id=pipeline.tokenizer.bos_token_id,
            eos_token_id=pipeline.tokenizer.eos_token_id,
        )
        pipeline.register_modules(unet=unet, vae=vae, text_encoder=CLIPTextModel(text))
    pipeline.save_pretrained(folder)


def _made(base: Callable, dtype: torch.dtype, device: torch.device):
    with gpu.made_in(dtype, device):
        return base()


PARTS = {
    "approximation_error": Part(
        "10_approximation_error",
        "classification",
        {"dataset": "demo-reviews", "n_train": 512, "n_validation": 64, "epochs": 1, "rank": 8},
        make_roberta,
        4500 + 500,
    ),
    "text": Part(
        "30_text_identification", "text", {"n_train": 16, "n_test": 2, "epochs": 1}, make_llama, 900 + 2 * 100
    ),
    "images": Part(
        "40_image_identification",
        "images",
        {"task": "demo-style", "n_train": 4, "n_test": 2, "steps": 5, "inference_steps": 5, "inception": ""},
        make_diffusion,
        3 * (200 + 150),
    ),
}
TINY = {
    "approximation_error": {"n_train": 16, "n_validation": 8},
    "text": {"n_train": 2, "n_test": 1},
    "images": {"n_train": 3, "n_test": 1, "steps": 2, "size": 128, "inference_steps": 2},
}


def rehearse(name: str, tiny: bool, device: torch.device, folder: Path) -> pd.DataFrame:
    """Make the base, execute the notebook, and read what it measured of itself."""
    part, base = PARTS[name], folder / "base"
    began = time.perf_counter()
    part.make(base, tiny, device)
    clear_device_cache(garbage_collection=True)
    print(f"{name}: the base is made, {time.perf_counter() - began:.0f} s", flush=True)
    config = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text(encoding="utf8"))[part.section]
    grid = config["grid"][0] if isinstance(config["grid"], list) else config["grid"]
    given = config["parameters"] | {key: values[0] for key, values in grid.items()} | part.settings
    given |= (TINY[name] if tiny else {}) | {"model": str(base)}
    if device.type == "cpu" and "quantization" in given:
        given["quantization"] = ""
    given |= {"cache": str(folder / "cache"), "output": str(folder / "record.csv")}
    path = ROOT / "notebooks" / f"{part.notebook}.ipynb"
    began = time.perf_counter()
    with watched(name, device, folder / "cache") as peak:
        papermill.execute_notebook(path, folder / path.name, given, cwd=ROOT, progress_bar=False)
    return stages(name, part, folder, time.perf_counter() - began, peak()).assign(experiment=name)


def stages(name: str, part: Part, folder: Path, seconds: float, peak: int) -> pd.DataFrame:
    """A row for each stage, from the notes that a run keeps in its cache and from its record, and one for the whole."""
    record = pd.read_csv(folder / "record.csv")
    queries = record["n_validation" if "n_validation" in record else "n_test"][0]
    done = record["n_train"][0] + queries * (2 if name == "text" else 1)
    rows = []
    for stage, kept in notes(folder / "cache").items():
        grows = {"done": done, "in_paper": part.in_paper} if stage.startswith("gradients") else {}
        rows.append({"stage": stage, "seconds": kept["seconds"], "peak_gb": kept["peak_mib"] / 1024, **grows})
    once = record.drop_duplicates("method")
    for method, costs in once.set_index("method").filter(regex="_(ihvp|scores)$").dropna().iterrows():
        rows.append(
            {
                "stage": f"ihvp and scores, {method}",
                "seconds": costs["seconds_ihvp"] + costs["seconds_scores"],
                "peak_gb": costs.filter(like="peak_mib").max() / 1024,
                "done": done,
                "in_paper": part.in_paper,
            }
        )
    disk = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 1e9
    rows.append({"stage": "whole notebook", "seconds": seconds, "peak_gb": peak / 2**30, "disk_gb": disk})
    table = pd.DataFrame(rows)
    gradients = table["stage"].str.startswith("gradients")
    table["paper_hours"] = (table["seconds"] / 3600 * table["in_paper"] / table["done"]).where(gradients)
    table["paper_disk_gb"] = (table["disk_gb"] * part.in_paper / done).where(table["stage"] == "whole notebook")
    return table


@contextmanager
def watched(name: str, device: torch.device, cache: Path) -> Iterator[Callable[[], int]]:
    """Yield a function that gives the most bytes held during the block: by all on the GPU, or by child processes.
    Meanwhile each stage that the notebook ends is told, so that a rehearsal that is cut short has said something."""
    seen, told, over = [0], set(), threading.Event()

    def held() -> int:
        if device.type == "cuda":
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
            return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20
        return max((child.memory_info().rss for child in psutil.Process().children(recursive=True)), default=0)

    def watch() -> None:
        while not over.wait(0.5):
            with suppress(psutil.NoSuchProcess):  # it has ended between the two questions
                seen[0] = max(seen[0], held())
            for note, kept in notes(cache).items():
                if note not in told and kept["seconds"] == kept["seconds"]:  # not a number while it is under way
                    told.add(note)
                    print(f"{name}: {note}, {kept['seconds']:.3g} s, {in_words(seen[0])} held at most", flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        over.set()
        watcher.join()


def notes(cache: Path) -> dict[str, dict[str, float]]:
    """What a run has noted in its cache of the cost of its stages, by their names."""
    found = {note.stem: json.loads(note.read_text(encoding="utf8")) for note in sorted(cache.glob("*/*.json"))}
    return {name: kept for name, kept in found.items() if "peak_mib" in kept}


def main(arguments: Sequence[str] | None = None) -> None:
    """Rehearse the parts asked for, and write the record after each."""
    parser = argparse.ArgumentParser(description="Rehearse the paper's scale with random weights.")
    parser.add_argument("--only", choices=PARTS, action="append", help="rehearse this alone")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on the CPU where there is no GPU")
    parser.add_argument("--folder", type=Path, help="where checkpoints and caches are made (a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/rehearsal.csv"), help="the record")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.exit(2, "These shapes need a CUDA device: run this on a large GPU, or give --tiny.\n")
    record, failed = pd.DataFrame(), []
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            try:
                rows = rehearse(name, options.tiny, device, Path(folder))
            except Exception as error:
                print(f"{name}: FAILED, {type(error).__name__}: {str(error).strip()[-2000:]}", flush=True)
                failed.append(name)
                continue
        record = pd.concat([record, rows.assign(scale="tiny" if options.tiny else "full")])
        columns = ["stage", "seconds", "peak_gb", "disk_gb", "done", "in_paper", "paper_hours", "paper_disk_gb"]
        print(rows.reindex(columns=columns).to_string(index=False, na_rep="", float_format="{:.3g}".format), flush=True)
        common.write(record.reindex(columns=["experiment", "scale", *columns]), options.output)
    if failed:
        raise SystemExit(f"Not rehearsed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
