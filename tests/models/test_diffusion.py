"""The image tasks' model: noisy latents, the denoising loss and its gradients, fine-tuning, drawing, and distance."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from scipy import linalg

import datainf
from datainf.data import images
from datainf.errors import InputError
from datainf.evaluation import frechet
from datainf.models import diffusion, losses, training
from datainf.models.lora import Recipe

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "conv_in")
SMALL = {"rank": 2, "dropout": 0.0, "targets": ATTENTION, "learning_rate": 1e-2, "steps": 20, "batch_size": 4}
TIMESTEPS = (25, 525, 925)


@pytest.fixture(scope="module")
def task():
    return images.load("demo-style", n_train=4, n_test=2, size=16)


@pytest.fixture(scope="module")
def tuned(diffusion_base, task, tmp_path_factory):
    recipe = Recipe(**SMALL | {"targets": ATTENTION + CONVOLUTIONS})
    folder = tmp_path_factory.mktemp("tuned")
    return diffusion.fine_tune(diffusion_base, task, recipe, timesteps=TIMESTEPS, folder=folder)


def noisy(n=3, prediction_type="epsilon", **arguments):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    torch.manual_seed(0)
    return diffusion.NoisyLatents(torch.randn(n, 4, 8, 8), torch.randn(n, 5, 12), scheduler, **arguments)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


# Noise.


def test_noise_is_seeded_by_example_and_draw():
    first, again = noisy(noise="a"), noisy(noise="a")
    assert same(first[1], again[1]) and first[1]["sample"].shape == (6, 4, 8, 8)
    noise = [item["target"] for item in (first[0], first[1], noisy(noise="b")[1])]
    assert all(not torch.equal(noise[i], noise[j]) for i, j in ((0, 1), (1, 2)))
    twice = first.but(draws=2)[1]
    assert twice["timestep"].tolist() == [*diffusion.TIMESTEPS] * 2
    assert torch.equal(twice["sample"][:6], first[1]["sample"])
    assert not torch.equal(twice["target"][6:], twice["target"][:6])


def test_noise_for_training_is_drawn_anew(tuned):
    data = tuned.query
    loss, batch = diffusion.training_loss(data.scheduler), tuned.collate(data.clean())
    with torch.no_grad():
        torch.manual_seed(0)
        one, other = loss(tuned.model, batch), loss(tuned.model, batch)
        torch.manual_seed(0)
        again = loss(tuned.model, batch)
        given = tuned.collate([data[0]])
        assert torch.equal(loss(tuned.model, given), losses.denoising(tuned.model, given))
    assert one.shape == (len(data),) and torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noisy_latents_and_targets_are_the_schedulers(kind):
    """From the definition: z_t = a z + s e with a^2 + s^2 = 1; the target is e, a e - s z, or z."""
    data = noisy(prediction_type=kind)
    item, z = data[2], data.latents[2]
    a2 = data.scheduler.alphas_cumprod[item["timestep"]].view(-1, 1, 1, 1)
    a, s = a2.sqrt(), (1 - a2).sqrt()
    noise = (item["sample"] - a * z) / s
    expected = {"epsilon": noise, "v_prediction": a * noise - s * z, "sample": z.expand_as(noise)}[kind]
    torch.testing.assert_close(item["target"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"timesteps": [1000]}, "timesteps must be among 0 to 999, not \\[1000\\]"),
        ({"timesteps": []}, "timesteps must be among"),
        ({"draws": 0}, "draws must be at least 1, not 0"),
    ],
)
def test_noise_that_there_is_not(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        noisy(**arguments)


# Gradients.


def test_the_loss_is_the_mean_over_timesteps(tuned):
    item = tuned.train[0]
    with torch.no_grad():
        (whole,) = losses.denoising(tuned.model, tuned.collate([item]))
        apart = losses.denoising(tuned.model, tuned.collate(diffusion.separate(item)))
        (total,) = losses.denoising(tuned.model, tuned.collate([item]), reduction="sum")
    assert len(apart) == len(TIMESTEPS)
    torch.testing.assert_close(whole, apart.mean())
    torch.testing.assert_close(total, apart.sum())


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", ["mean", "concat"])
def test_unet_gradients_equal_the_one_example_loop(tuned, name, batch_size):
    """Attention and convolutional LoRA layers; the loop takes one timestep of one picture at a time.

    In float64: some layers' gradients are so small beside what they are the sum of that float32 has but five digits.
    """
    model, options = copy.deepcopy(tuned.model).double(), dict(losses.image(name))

    def in_float64(loss_fn, model, batch):
        return loss_fn(model, {key: v.double() if v.is_floating_point() else v for key, v in batch.items()})

    options["loss_fn"] = partial(in_float64, options["loss_fn"])
    fast = datainf.per_sample_gradients(
        model, tuned.query, rows_per_example=len(TIMESTEPS), batch_size=batch_size, dtype=torch.float64, **options
    )
    assert any("attn2.to_k.lora_A" in layer for layer in fast) and any("conv1.lora_A" in layer for layer in fast)
    apart = [version for index in range(len(tuned.query)) for version in diffusion.separate(tuned.query[index])]
    plain = datainf.reference_gradients(model, apart, partial(in_float64, losses.denoising))
    by_picture = {layer: rows.view(len(tuned.query), len(TIMESTEPS), -1) for layer, rows in plain.items()}
    together = {"mean": lambda rows: rows.mean(dim=1), "concat": lambda rows: rows.flatten(1)}[name]
    assert relative_error(fast, {layer: together(rows) for layer, rows in by_picture.items()}) <= 1e-10


def test_a_store_is_taken_up_again_wherever_the_latents_are_in_memory(tuned, tmp_path):
    data = tuned.query
    copy = diffusion.NoisyLatents(
        data.latents.clone(), data.prompts.clone(), data.scheduler, TIMESTEPS, noise=data.noise
    )
    arguments = {"rows_per_example": len(TIMESTEPS), "store": tmp_path / "store", **losses.image("mean")}
    first, again = (datainf.per_sample_gradients(tuned.model, each, **arguments) for each in (data, copy))
    assert same(dict(first.items()), dict(again.items()))
    with pytest.raises(ValueError, match="differs in: examples"):
        datainf.per_sample_gradients(tuned.model, data.but(noise="other"), **arguments)


def test_more_draws_are_more_rows(tuned):
    data = tuned.query.but(draws=2)
    store = datainf.per_sample_gradients(tuned.model, data, rows_per_example=6, **losses.image("mean"))
    plain = datainf.reference_gradients(tuned.model, data, losses.denoising)
    assert relative_error(store, plain) <= 1e-5


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="Unknown loss 'as_published': choose one of mean, concat"):
        losses.image("as_published")


# Fine-tuning.


def weights(tuned):
    return {name: p.detach().clone() for name, p in tuned.model.named_parameters() if p.requires_grad}


def test_fine_tuning_learns_and_only_the_adapter(diffusion_base, tuned):
    base = diffusion.load(diffusion_base).unet.state_dict()
    inside = tuned.pipeline.unet.state_dict()
    for name, weight in base.items():
        assert any(
            torch.equal(inside[kept], weight)
            for kept in (name, name.replace(".weight", ".base_layer.weight"), name.replace(".bias", ".base_layer.bias"))
            if kept in inside
        )
    assert tuned.history["loss"].iloc[-1] < tuned.history["loss"].iloc[0]
    assert tuned.history["step"].tolist() == [4, 8, 12, 16, 20] and tuned.history["query_loss"].notna().all()


def test_killed_and_called_again_it_ends_with_the_same_weights(diffusion_base, task, tmp_path, monkeypatch):
    whole = diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL), folder=tmp_path / "whole")

    def dies(self, args, state, control, **kwargs):
        if state.global_step == 17:  # three steps an epoch, a checkpoint every four: in the middle of both
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Progress, "on_step_end", dies)
        with pytest.raises(KeyboardInterrupt):
            diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL), folder=tmp_path / "cut")
    resumed = diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL), folder=tmp_path / "cut")
    assert same(weights(resumed), weights(whole))
    assert resumed.history.equals(whole.history)


def test_a_saved_adapter_is_taken_instead(diffusion_base, task, tmp_path):
    made = diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL), folder=tmp_path / "made")
    taken = diffusion.fine_tune(
        diffusion_base, task, Recipe(**SMALL), adapter=str(tmp_path / "made" / "adapter"), folder=tmp_path / "taken"
    )
    assert same(weights(taken), weights(made)) and taken.history.empty and taken.revision == made.revision


def test_bad_input_is_named_in_one_sentence(diffusion_base, task, tmp_path):
    whole = diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL | {"steps": 1}), folder=tmp_path / "made")
    assert not any(module.training for module in whole.pipeline.unet.modules())
    saved = str(tmp_path / "made" / "adapter")

    def refused(message, base=diffusion_base, data=task, adapter="", timesteps=TIMESTEPS, **recipe):
        with pytest.raises(InputError, match=message) as caught:
            arguments = {"timesteps": timesteps, "adapter": adapter, "folder": tmp_path / "run"}
            diffusion.fine_tune(base, data, Recipe(**SMALL | recipe), **arguments)
        assert "\n" not in str(caught.value)

    refused("cannot carry a LoRA adapter on q_proj", targets=("q_proj",))
    refused("There is no folder ./nowhere", base="./nowhere")
    refused("can be loaded neither from a folder nor from the hub|is not a Stable Diffusion", base="demo-llama")
    refused("size must be a multiple of 2", data=images.load("demo-style", n_train=2, n_test=1, size=17))
    refused("timesteps must be among 0 to 999", timesteps=(-1,))
    refused("There is no adapter in ./nothing", adapter="./nothing")
    refused("has targets .* set targets to", adapter=saved, targets=("to_q",))
    refused("steps must be a whole number of at least 0, not -5", steps=-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_trains_in_bfloat16_and_takes_gradients_in_float32(diffusion_base, task, tmp_path):
    tuned = diffusion.fine_tune(diffusion_base, task, Recipe(**SMALL, bf16=True), timesteps=TIMESTEPS, folder=tmp_path)
    assert tuned.pipeline.device.type == next(tuned.model.parameters()).device.type == "cuda"
    fast = datainf.per_sample_gradients(tuned.model, tuned.query, rows_per_example=3, **losses.image("mean"))
    plain = datainf.reference_gradients(tuned.model, tuned.query, losses.denoising)
    assert relative_error(fast, plain) <= 1e-3
    assert len(diffusion.generate(tuned.pipeline, ["a thing"], size=16, steps=2, guidance=2.0, seed=0)) == 1


# Generating.


def test_generating_follows_from_the_seed_and_the_adapter(tuned):
    settings = {"size": 16, "steps": 3, "guidance": 2.0, "seed": 1}
    prompts = ["a thing", "a picture", "a style"]
    one, again = (diffusion.generate(tuned.pipeline, prompts, batch_size=size, **settings) for size in (2, 3))
    assert [picture.size for picture in one] == [(16, 16)] * 3
    for a, b in zip(one, again, strict=True):
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).max() <= 2  # batched otherwise, rounded otherwise
    with tuned.model.disable_adapter():
        base = diffusion.generate(tuned.pipeline, prompts, **settings)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(again, base, strict=True))


# Distance.


def some_pictures(n, shift, seed):
    rng = np.random.default_rng(seed)
    values = np.clip(rng.normal(120 + shift, 40, (n, 16, 16, 3)), 0, 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in values]


def test_frechet_distance_is_its_formula(diffusion_base):
    """|mean - mean|^2 + trace(C + C' - 2 (C C')^(1/2)), with scipy's matrix root."""
    network = frechet.AutoencoderFeatures(diffusion.load(diffusion_base).vae)
    sets = [some_pictures(60, shift, seed) for shift, seed in ((0, 0), (60, 1))]
    features = [
        network(torch.tensor(np.stack([np.asarray(p) for p in some])).permute(0, 3, 1, 2)).double() for some in sets
    ]
    assert features[0].shape == (60, network.num_features)
    (mean, other_mean), (C, other_C) = ([f(x) for x in features] for f in (lambda x: x.mean(0), lambda x: x.T.cov()))
    root = linalg.sqrtm((C @ other_C).numpy()).real
    expected = (mean - other_mean).square().sum() + (C + other_C).trace() - 2 * root.trace()
    assert frechet.distance(*sets, network) == pytest.approx(expected.item(), rel=1e-3)
    assert frechet.distance(sets[0], sets[0], network) == pytest.approx(0, abs=1e-4)
    assert frechet.distance(sets[0], some_pictures(60, 0, 2), network) < expected


def test_inception_is_asked_for_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(frechet, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torch-fidelity: pip install"):
        frechet.distance([], [], "download")
    monkeypatch.setattr(frechet, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="There is no file"):
        frechet.distance([], [], str(tmp_path / "weights.pth"))


def test_no_pipeline_is_left_changed_by_a_distance(tuned):
    frechet.distance(some_pictures(4, 0, 0), some_pictures(4, 9, 1), frechet.AutoencoderFeatures(tuned.pipeline.vae))
    assert tuned.pipeline.vae.dtype == torch.float32
