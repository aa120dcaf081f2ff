"""The built-in bases: a small RoBERTa, Llama and Stable Diffusion in the hub's format, and what trained them.

`train_base`, `train_llama`, `train_diffusion`: each trains one again. `corpus`, `llama_corpus`: of which texts.
`command`: their command line.
"""

from pathlib import Path

BASE = Path(__file__).with_name("base")
"""Folder of the pre-trained RoBERTa, in the hub's format."""

LLAMA = Path(__file__).with_name("llama")
"""Folder of the pre-trained Llama, in the hub's format."""

DIFFUSION = Path(__file__).with_name("diffusion")
"""Folder of the pre-trained Stable Diffusion pipeline, in the hub's format."""

BASES: dict[str, Path] = {"demo-roberta": BASE, "demo-llama": LLAMA, "demo-diffusion": DIFFUSION}
"""Built-in bases by the name that stands for a model in notebooks and configuration files."""
