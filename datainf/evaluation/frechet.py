"""How far generated pictures are from real ones: the Fréchet distance between their features (paper Table 4)."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from datainf.errors import InputError


class AutoencoderFeatures(nn.Module):
    """Mean and standard deviation of each latent channel in each quarter of a picture: (n, 8 * channels)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae, self.num_features = vae, 8 * vae.config.latent_channels

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Float[Tensor, "n features"]:
        """`pictures`: uint8, (n, 3, size, size).

        Raises:
            InputError: pictures with latents too few to tell quarters apart.
        """
        latents = self.vae.encode(pictures.to(self.vae.dtype) / 127.5 - 1).latent_dist.mean
        if latents.shape[-1] < 2:
            raise InputError(f"Pictures of {pictures.shape[-1]} pixels have latents of less than 2 x 2: raise size.")
        quarters = [quarter for rows in latents.chunk(2, dim=2) for quarter in rows.chunk(2, dim=3)]
        moments = [moment for quarter in quarters for moment in torch.std_mean(quarter, dim=(2, 3), correction=0)]
        return torch.cat(moments, dim=1)


def distance(real: Sequence[Image.Image], generated: Sequence[Image.Image], network: nn.Module | str) -> float:
    """The Fréchet distance between the features of real and of generated pictures, taken for normally distributed.

    Args:
        network: gives the features of pictures as `AutoencoderFeatures.forward` does; or the weights of FID's own
            Inception network: a file, or "download".

    Raises:
        InputError: no such file, or torch-fidelity, which Inception needs, is not installed.
    """
    metric = FrechetInceptionDistance(network) if isinstance(network, nn.Module) else _inception(network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metric.to(device)
    for pictures, are_real in ((real, True), (generated, False)):
        for first in range(0, len(pictures), 16):
            stacked = np.stack([np.asarray(picture) for picture in pictures[first : first + 16]])
            metric.update(torch.from_numpy(stacked).permute(0, 3, 1, 2).to(device), real=are_real)
    return metric.compute().item()


def _inception(weights: str) -> FrechetInceptionDistance:
    """FID's own network."""
    if find_spec("torch_fidelity") is None:
        raise InputError("FID's Inception network needs torch-fidelity: pip install 'datainf-study[fid]'.")
    weights = os.path.expanduser(weights)
    if weights != "download" and not Path(weights).is_file():
        raise InputError(f'There is no file {weights}: give the weights of FID\'s Inception network, or "download".')
    return FrechetInceptionDistance(feature_extractor_weights_path=None if weights == "download" else weights)
