"""Pre-train the demo diffusion pipeline: a small latent diffusion model on pictures of the project's own making.

    python -m datainf.demo.train_diffusion [--steps N] [--output DIR] [--seed 0]

First the autoencoder learns to compress pictures of 32 x 32 pixels in every style, then the UNet and the text encoder
learn together to denoise their latents, given the captions. The pictures are scenes and portraits from
`datainf.data.scenes`, mostly in the plain style. The styles of the demo task appear in a few of them under invented
names, and styles that the task does not have under names of their own: so the base knows that "a specific ... style"
changes the look of everything, as a large model does, but not what "cartoon" means.
"""

import json
import logging
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, set_seed

from datainf.data.built_in import scenes, things
from datainf.data.images import STYLE_PROMPT
from datainf.demo import DIFFUSION, command

logger = logging.getLogger(__name__)

SIZE = 32
STEPS = 8000
AUTOENCODER_STEPS = 4000  # at most twice as many as the denoiser takes
BATCH = 16
CHANNELS = 4  # of the latents
LOG_EVERY = 100
PICTURES = 20_000
MAX_LENGTH = 40  # tokens
TOKENS = 960
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

Tint = Callable[[Image.Image], Image.Image]
TINTS: dict[str, Tint] = {
    "sepia": lambda picture: ImageOps.colorize(picture.convert("L"), (40, 24, 10), (250, 232, 196)),
    "pastel": lambda picture: Image.blend(picture, Image.new("RGB", picture.size, (255, 246, 250)), 0.6),
    "dark": lambda picture: ImageEnhance.Brightness(picture).enhance(0.4),
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(picture.width / 20)),
}


class Example(NamedTuple):
    picture: Image.Image
    caption: str


def corpus(n: int, seed: int) -> list[Example]:
    """Pictures with captions, none of them a scene of the demo tasks and none of their subjects."""
    rng = random.Random(f"corpus {seed}")
    return [_portrait(rng) if rng.random() < 0.4 else _scene(rng) for _ in range(n)]


def _scene(rng: random.Random) -> Example:
    scene = scenes.scene(rng)
    while not scenes.in_corpus(scene.caption):
        scene = scenes.scene(rng)
    kind = rng.random()
    if kind < 0.5:
        return Example(scenes.plain(scene, SIZE), scene.caption)
    if kind < 0.75:
        name = rng.choice(list(TINTS))
        return Example(TINTS[name](scenes.plain(scene, SIZE)), STYLE_PROMPT.format(style=name, text=scene.caption))
    paint = rng.choice([scenes.plain] * 3 + list(scenes.STYLES.values()))
    invented = " ".join(_invented_word(rng) for _ in range(rng.randint(1, 3)))
    return Example(paint(scene, SIZE), STYLE_PROMPT.format(style=invented, text=scene.caption))


def _portrait(rng: random.Random) -> Example:
    kind = rng.choice(list(things.CLASSES))
    look, words = scenes.random_look(rng)
    scene = scenes.portrait(kind, look, rng)
    place = scene.caption.removeprefix(f"a {kind} ")
    identifier = "".join(rng.choices(string.ascii_letters + string.digits, k=5))
    caption = rng.choice((f"a {kind}", f"a {words} {kind}", f"a {words} {kind} {place}", f"a {identifier} {kind}"))
    return Example(scenes.plain(scene, SIZE), caption)


def _invented_word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with merges learned from the captions: their frequent words are one token each."""
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner = CLIPTokenizer().backend_tokenizer  # for its normalisation and its splits
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = learned["vocab"]
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):  # any text can be written, at the end of a word too
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def tokens(captions: Sequence[str], tokenizer: CLIPTokenizer) -> Tensor:
    """(n, MAX_LENGTH) token ids, padded and cut as the pipeline does it."""
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return encoded["input_ids"]


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, size, size) from -1 to 1."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_models(vocabulary: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """Autoencoder (32 x 32 x 3 to 16 x 16 x 4), text encoder and UNet with random weights, 2.7 million in all."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,  # larger groups would hide from the last layers how bright a picture is
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    # Latents start with little noise (the second half of these channels is its log variance), not with noise alone.
    nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -5.0)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # a start as a nearly linear network trains far sooner
            nn.init.zeros_(module.conv2.weight)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            initializer_factor=3.0,  # the usual 0.02 is for wide models
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return vae, text_encoder, unet


def _optimise(modules: Sequence[nn.Module], loss: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """Train the modules in place."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05)
    total = 0.0
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += value.item()
        if step % LOG_EVERY == 0:
            logger.info("step %d: loss %.4f", step, total / LOG_EVERY)
            total = 0.0


def train_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int) -> None:
    """Teach the autoencoder these images, (n, 3, size, size), and set the scale of its latents."""

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (BATCH // 2,))]
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        return error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean() / SIZE

    _optimise([vae], loss, steps, learning_rate=4e-3)
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images[:256]).latent_dist.sample().std().item())


def train_denoiser(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    latents: Tensor,
    ids: Tensor,
    steps: int,
) -> None:
    """Teach UNet and text encoder to denoise latents (n, channels, 16, 16), given captions (n, MAX_LENGTH).

    One caption in ten is hidden, so that classifier-free guidance has an unconditional prediction to start from.
    """
    nothing = ids.new_full((MAX_LENGTH,), 1)
    nothing[0] = 0  # <|startoftext|>, then <|endoftext|> and padding, which are the same token

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,))
        captions = torch.where(torch.rand(BATCH, 1) < 0.1, nothing, ids[chosen])
        noise = torch.randn(BATCH, *latents.shape[1:])
        times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        noisy = scheduler.add_noise(latents[chosen], noise, times)
        predicted = unet(noisy, times, text_encoder(captions).last_hidden_state).sample
        return F.mse_loss(predicted, scheduler.get_velocity(latents[chosen], noise, times))

    _optimise([unet, text_encoder], loss, steps, learning_rate=1e-3)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (n, channels, 16, 16)."""
    means = [vae.encode(batch).latent_dist.mean for batch in images.split(256)]
    return torch.cat(means) * vae.config.scaling_factor


def train_diffusion(output: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the pipeline and save it in the hub's format, the weights in float16.

    Args:
        output: Folder to write; made if need be.
        steps: Optimisation steps of the denoiser, `BATCH` pictures each.
        seed: Seed of the pictures, the initial weights, the order and the noise.
    """
    examples = corpus(min(PICTURES, steps * BATCH), seed)
    images = pixels([example.picture for example in examples])
    captions = [example.caption for example in examples]
    tokenizer = build_tokenizer(captions)
    set_seed(seed)
    vae, text_encoder, unet = build_models(len(tokenizer))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (vae, text_encoder, unet)]
    logger.info("%d pictures, %d tokens; parameters: %s", len(examples), len(tokenizer), sizes)
    train_autoencoder(vae, images, min(AUTOENCODER_STEPS, 2 * steps))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        # Noise prediction hardly rewards the first, coarse decisions (colours, layout), which are what a caption is
        # about; so small a model learns to follow captions sooner when it predicts velocities.
        prediction_type="v_prediction",
    )
    set_seed(seed)  # the same noise whatever the autoencoder's training took
    train_denoiser(unet, text_encoder, scheduler, encode(vae, images), tokens(captions, tokenizer), steps)
    StableDiffusionPipeline(
        # Pipelines are read in float32; float16 halves their size on disk.
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        unet=unet.half(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output)


if __name__ == "__main__":
    command.pretrain(
        train_diffusion, "Pre-train the demo diffusion pipeline on generated pictures.", steps=STEPS, output=DIFFUSION
    )
