"""Fine-tune a latent diffusion model on captioned pictures, and generate some (paper D.2.2, D.2.3)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import set_seed

from datainf.data.images import ImageTask
from datainf.errors import InputError
from datainf.gradients.per_sample import LossFn
from datainf.models import lora
from datainf.models.lora import FineTuned, Recipe
from datainf.models.losses import denoising
from datainf.models.training import Training
from datainf.progress import bar

TIMESTEPS = (25, 225, 425, 525, 725, 925)
"""Where the published code takes the denoising loss, of 1,000."""


@dataclass(frozen=True)
class FineTunedPipeline(FineTuned):
    """A fine-tuned UNet (`model`), with the pipeline it is part of and its examples as `NoisyLatents`."""

    pipeline: StableDiffusionPipeline
    train: "NoisyLatents"
    query: "NoisyLatents"


class NoisyLatents(torch.utils.data.Dataset):
    """Pictures as the denoising loss takes them: each one's latents with T different amounts of noise in them.

    An item has ``sample`` (T, channels, height, width), the noisy latents; ``timestep`` (T,), how noisy each is;
    ``encoder_hidden_states`` (tokens, width), what the prompt says; and ``target``, shaped as sample: what the UNet
    should say of each, which is the noise, the velocity or the latents, as the scheduler's prediction type has it.

    Args:
        latents: of n pictures, (n, channels, height, width), scaled.
        prompts: the text encoder's last hidden states, (n, tokens, width).
        scheduler: says how much noise a timestep is.
        timesteps: T of them, `draws` times over.
        draws: how many times noise is drawn for each of the timesteps.
        noise: names the noise. An item's noise is seeded by this, its index and the number of the draw.

    Raises:
        InputError: a timestep or a prediction type that the scheduler does not have, or draws below 1.
    """

    def __init__(
        self,
        latents: Float[Tensor, "n channels height width"],
        prompts: Float[Tensor, "n tokens width"],
        scheduler: DDPMScheduler,
        timesteps: Sequence[int] = TIMESTEPS,
        *,
        draws: int = 1,
        noise: str = "",
    ):
        steps, kind = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
        if draws < 1:
            raise InputError(f"draws must be at least 1, not {draws}.")
        if not timesteps or not all(0 <= timestep < steps for timestep in timesteps):
            raise InputError(f"timesteps must be among 0 to {steps - 1}, not {list(timesteps)}.")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"The base predicts {kind!r}; epsilon, v_prediction and sample are supported.")
        self.latents, self.prompts, self.scheduler = latents, prompts, scheduler
        self.timesteps, self.draws, self.noise = timesteps, draws, noise

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def versions(self) -> int:
        """How many noisy versions a picture has: the rows that an example is of the model's batch."""
        return len(self.timesteps) * self.draws

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        latents = self.latents[index]
        timestep = torch.tensor(self.timesteps).repeat(self.draws)
        noise = torch.cat([self._noise(index, draw, latents.shape) for draw in range(self.draws)])
        return {
            **noisy(self.scheduler, latents.expand(len(timestep), *latents.shape), timestep, noise),
            "encoder_hidden_states": self.prompts[index],
        }

    def _noise(self, index: int, draw: int, shape: torch.Size) -> Float[Tensor, "timesteps channels height width"]:
        seed = random.Random(f"{self.noise} {index} {draw}").getrandbits(63)
        return torch.randn(len(self.timesteps), *shape, generator=torch.Generator().manual_seed(seed))

    def clean(self) -> list[dict[str, Tensor]]:
        """The same pictures without noise, which fine-tuning draws at every step: latents, encoder_hidden_states."""
        pairs = zip(self.latents, self.prompts, strict=True)
        return [{"latents": latents, "encoder_hidden_states": prompt} for latents, prompt in pairs]

    def but(self, **other) -> "NoisyLatents":
        """The same pictures with other `timesteps`, `draws` or `noise`."""
        same = {"timesteps": self.timesteps, "draws": self.draws, "noise": self.noise}
        return NoisyLatents(self.latents, self.prompts, self.scheduler, **(same | other))


def noisy(scheduler: DDPMScheduler, latents: Tensor, timestep: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """What `NoisyLatents` has of latents (T, channels, height, width): sample, timestep and target."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timestep)
    else:
        target = {"epsilon": noise, "sample": latents}[kind]
    return {"sample": scheduler.add_noise(latents, noise, timestep), "timestep": timestep, "target": target}


def training_loss(scheduler: DDPMScheduler) -> LossFn:
    """The denoising loss at a timestep and with noise drawn anew for each example; of noisy examples, theirs.

    Drawn here and not when a batch is fetched, which may be ahead of its step, a run that was killed goes on with the
    draws it would have made.
    """

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
        if "target" in batch:
            return denoising(model, batch)
        latents = batch["latents"]
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        once = noisy(scheduler, latents, timestep, torch.randn_like(latents))
        one_version = {name: value[:, None] for name, value in once.items()}
        return denoising(model, {**one_version, "encoder_hidden_states": batch["encoder_hidden_states"]})

    return loss


def separate(item: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The T noisy versions of an item of `NoisyLatents` as T items of one version each."""
    shared = {"encoder_hidden_states": item["encoder_hidden_states"]}
    apart = {name: value.split(1) for name, value in item.items() if name not in shared}
    return [shared | dict(zip(apart, version, strict=True)) for version in zip(*apart.values(), strict=True)]


def fine_tune(
    base: str,
    task: ImageTask,
    recipe: Recipe,
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    draws: int = 1,
    adapter: str = "",
    folder: str | Path,
) -> FineTunedPipeline:
    """Fine-tune a pipeline's UNet on a task's pictures with LoRA, or load what an earlier call with this `folder` has
    finished. Autoencoder and text encoder stay as they are and run once for each picture.

    Args:
        base: a Stable Diffusion pipeline: a hub id, a folder in the hub's format, or a built-in base (`demo.BASES`).
        timesteps, draws: of the noise in the examples that are given back; see `NoisyLatents`.
        adapter: a folder with a saved adapter to take instead of fine-tuning one.
        folder: keeps the adapter, the curve and the checkpoints; see `lora.fine_tune`.

    Raises:
        InputError: a base that is no such pipeline or has none of the recipe's modules, pictures of a size that it
            cannot take, timesteps that it does not have, an adapter that does not fit.
    """
    pipeline = load(base)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    train, query = (
        NoisyLatents(*encode(pipeline, split), scheduler, timesteps, draws=draws, noise=f"{name} {recipe.seed}")
        for split, name in ((task.train, "train"), (task.test, "test"))
    )
    revision = lora.weights_revision(nn.ModuleList([pipeline.unet, pipeline.vae, pipeline.text_encoder]))
    if adapter:
        model, history = lora.on_device(lora.load_adapter(pipeline.unet, adapter)), lora.no_history()
        lora.check_shape(model, recipe, adapter)
        training = None
    else:
        pipeline.unet = None  # makes room for the one that is trained
        training = Training(
            lambda: load_unet(base, seed=recipe.seed),
            train.clean(),
            query.but(timesteps=TIMESTEPS, draws=1),
            default_collate,
            recipe,
            task_type=None,
            loss=training_loss(scheduler),
        )
        model, history, _ = lora.fine_tune(training, data_revision=task.revision, revision=revision, folder=folder)
    pipeline.unet = model.eval().get_base_model()  # the adapter's matrices are within it
    return FineTunedPipeline(
        model, pipeline.tokenizer, train, query, default_collate, history, revision, training, pipeline
    )


def load(base: str) -> StableDiffusionPipeline:
    """A pretrained pipeline in float32, frozen, on the GPU where there is one.

    Raises:
        InputError: no such pipeline, or one of another kind.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipeline = lora.from_pretrained(StableDiffusionPipeline, base, dtype=torch.float32, **parts)
    except (AttributeError, TypeError) as error:  # diffusers, of a pipeline with other parts
        raise InputError(f"The model {base!r} is not a Stable Diffusion pipeline: {error}") from error
    for name in ("unet", "vae", "text_encoder"):
        if not isinstance(part := getattr(pipeline, name, None), nn.Module):
            raise InputError(f"The model {base!r} is not a Stable Diffusion pipeline: it has no {name}.")
        part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def load_unet(base: str, *, seed: int = 0) -> UNet2DConditionModel:
    """The pipeline's UNet alone, in float32; `seed` is that of its next adapter."""
    set_seed(seed)
    return lora.from_pretrained(UNet2DConditionModel, base, subfolder="unet", dtype=torch.float32)


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, split: Dataset, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Scaled latents (n, channels, height, width) of the pictures and hidden states (n, tokens, width) of the prompts.

    Raises:
        InputError: pictures of a size that the autoencoder cannot take.
    """
    factor = pipeline.vae_scale_factor
    if (size := split[0]["image"].width) % factor:
        raise InputError(f"size must be a multiple of {factor}, by which the autoencoder divides it, not {size}.")
    device, latents, prompts = pipeline.device, [], []
    with bar(total=len(split), desc="encoding", unit="picture") as progress:
        for rows in split.iter(batch_size):
            pixels = pipeline.image_processor.preprocess(rows["image"]).to(device)
            latents.append(pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor)
            prompts.append(pipeline.encode_prompt(rows["prompt"], device, 1, False)[0])
            progress.update(len(pixels))
    return torch.cat(latents).cpu(), torch.cat(prompts).cpu()


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    size: int,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int = 16,
) -> list[Image.Image]:
    """The pipeline's own picture for each prompt, size x size; the same seed starts each from the same noise again.

    Args:
        steps: of the scheduler.
        guidance: how far classifier-free guidance goes; 1 is none.
    """
    pictures = []
    with bar(total=len(prompts), desc="generating", unit="picture") as progress:
        for first in range(0, len(prompts), batch_size):
            some = list(prompts[first : first + batch_size])
            starts = [torch.Generator().manual_seed(seed * 10**6 + first + place) for place in range(len(some))]
            output = pipeline(
                some, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance, generator=starts
            )
            pictures += output.images
            progress.update(len(some))
    return pictures
