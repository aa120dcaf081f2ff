"""Per-sample gradients and influence at the paper's sizes on one large GPU, such as an H200, in some minutes.

python -m benchmarks.gpu                         # all parts; --only roberta (or "roberta bfloat16", ...): those
python -m benchmarks.gpu --tiny --device cpu     # toy sizes, to see that it runs

Weights, gradients, tokens and latents are random, since speed does not depend on them; nothing is downloaded. Adapters
are in float32 in a bfloat16 base too, as PEFT has them; TensorFloat-32 is off. Beside the columns of
``benchmarks.benchmark`` the record has

    examples_per_second    of gradients; of influence, training examples scored for all queries
    peak_bytes             the most held on the device in one call, beyond the model or the gradients that were there
    share_of_rate          influence's operations per second over those of a large square matrix product in this run
    scale                  full or tiny, which is held against no limit
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from benchmarks import common
from benchmarks.common import PAD, Row, check_close, matrix_product_rate, relative_difference, row, show, take_turns
from datainf import influence, per_sample_gradients, progress, reference_gradients, scaling
from datainf.gradients.batches import batches
from datainf.gradients.per_sample import LossFn
from datainf.models.lora import Recipe, attach_adapter
from datainf.models.losses import IGNORED, classification, completion, denoising
from datainf.storage.memory import in_words

NAN = float("nan")
GRADIENTS_LIMIT, LOOP_LIMIT, DATAINF_LIMIT = 1.15, 1 / 20, 1 / 0.60  # the largest ratio_to_baseline allowed
LLAMA_LEAST = 30  # examples per second; published: about 1.5
ADAPTER = "lora_"  # the layers whose gradients are taken: not a classifier's head
QUERIES = 100
PLAIN, OURS = "forward and backward", "per_sample_gradients"
LOOP, WITH_HEAD = "one at a time", "per_sample_gradients, head too"


# --- What gradients are taken of: shapes of models, and examples for them -------------------------------------------


class Case(NamedTuple):
    """A base, its adapter and examples. The first `looped` of them are taken one at a time, and that is scaled up."""

    base: Callable[[], nn.Module]
    rank: int
    targets: tuple[str, ...]
    task_type: str | None
    loss_fn: LossFn
    collate_fn: Callable[[list], Mapping]
    examples: Sequence[Mapping]
    what: str
    batch_size: int
    looped: int


def roberta(tiny: bool) -> Case:
    """RoBERTa-large and texts of different lengths."""
    width, layers, vocabulary = (32, 2, 1600) if tiny else (1024, 24, 50265)
    count, longest, batch_size, looped = (8, 16, 4, 2) if tiny else (2048, 128, 128, 16)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 16, "vocab_size": vocabulary}
    config = RobertaConfig(num_hidden_layers=layers, max_position_embeddings=514, pad_token_id=PAD, **sizes)
    lengths = torch.randint(longest // 2, longest + 1, (count,)).tolist()
    texts = [{"input_ids": torch.randint(5, vocabulary, (k,)), "labels": i % 2} for i, k in enumerate(lengths)]
    what = f"{count} texts of {longest // 2}-{longest} tokens"
    base = partial(RobertaForSequenceClassification, config)
    return Case(base, 8, ("value",), "SEQ_CLS", classification, common.collate, texts, what, batch_size, looped)


def llama(tiny: bool) -> Case:
    """Llama-2-13B and texts of one length, half prompt and half response."""
    width, within, layers, heads, vocabulary = (32, 48, 2, 2, 1000) if tiny else (5120, 13824, 40, 40, 32000)
    count, tokens, batch_size, looped = (8, 16, 4, 2) if tiny else (256, 128, 32, 8)
    sizes = {"hidden_size": width, "intermediate_size": within, "num_attention_heads": heads, "vocab_size": vocabulary}
    base = partial(LlamaForCausalLM, LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, **sizes))
    ids = torch.randint(5, vocabulary, (count, tokens))
    labels = torch.where(torch.arange(tokens) < tokens // 2, IGNORED, ids)
    attended, what = torch.ones(tokens, dtype=torch.long), f"{count} texts of {tokens} tokens"
    pairs = zip(ids, labels, strict=True)
    texts = [{"input_ids": one, "attention_mask": attended, "labels": label} for one, label in pairs]
    targets = ("q_proj", "v_proj")
    return Case(base, 8, targets, "CAUSAL_LM", completion, default_collate, texts, what, batch_size, looped)


def unet(tiny: bool) -> Case:
    """The UNet of Stable Diffusion 1.5 and latents of pictures in bfloat16, each at one timestep."""
    from diffusers import UNet2DConditionModel

    channels, blocks = ((32,) * 4, 1) if tiny else ((320, 640, 1280, 1280), 2)
    sizes = {"block_out_channels": channels, "layers_per_block": blocks, "attention_head_dim": 8}
    side, width, count, batch_size, looped = (16, 16, 4, 2, 2) if tiny else (64, 768, 128, 16, 8)

    def latents(index: int) -> dict[str, Tensor]:
        sample, target = torch.randn(2, 1, 4, side, side).bfloat16()
        timestep, prompt = torch.tensor([97 * index % 1000]), torch.randn(77, width).bfloat16()
        return {"sample": sample, "target": target, "timestep": timestep, "encoder_hidden_states": prompt}

    base = partial(UNet2DConditionModel, sample_size=side, cross_attention_dim=width, **sizes)
    targets, what = ("to_q", "to_k", "to_v", "to_out.0"), f"{count} latents of {side} x {side}"
    examples = [latents(index) for index in range(count)]
    return Case(base, 4, targets, None, denoising, default_collate, examples, what, batch_size, looped)


@contextmanager
def made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Modules made inside have their weights in `dtype` on `device`, and nowhere else before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def adapted(case: Case, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base with a random adapter, dropout off."""
    with made_in(dtype, device):
        base = case.base()
    model = attach_adapter(base, Recipe(rank=case.rank, targets=case.targets, dropout=0.0), case.task_type)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which leaves lora_A without a gradient
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


# --- 1. Per-sample gradients against a training step and against one example at a time ------------------------------


def benchmark_gradients(case: Case, dtype: torch.dtype, device: torch.device, repeats: int) -> list[Row]:
    """`per_sample_gradients`, kept in the model's own type; collating and the way off the device are timed too."""
    model, examples, count = adapted(case, dtype, device), case.examples, len(case.examples)
    few, take = examples[: case.looped], {"loss_fn": case.loss_fn, "collate_fn": case.collate_fn}

    def plain() -> None:
        for indices in batches(examples, 0, count, batch_size=case.batch_size, batch_tokens=None):
            model.zero_grad(set_to_none=True)
            batch = case.collate_fn([examples[index] for index in indices])
            case.loss_fn(model, send_to_device(batch, device)).mean().backward()
        model.zero_grad(set_to_none=True)

    def ours(examples: Sequence[Mapping] = examples, layers: str | None = ADAPTER) -> Mapping[str, Tensor]:
        return per_sample_gradients(model, examples, **take, batch_size=case.batch_size, dtype=dtype, layers=layers)

    def loop() -> Mapping[str, Tensor]:
        return reference_gradients(model, few, **take, layers=ADAPTER)

    pair = [torch.cat([G.float().flatten() for G in gradients.values()]) for gradients in (ours(few), loop())]
    if dtype == torch.float32:  # bfloat16 rounds too much for it
        check_close("gradients", *pair)
    functions = {PLAIN: plain, OURS: ours, LOOP: loop}
    if case.task_type == "SEQ_CLS":
        functions[WITH_HEAD] = partial(ours, layers=None)
    failed = failed_allocations(device)
    seconds, peaks = by_turns(functions, device, repeats)
    seconds[LOOP] = [count / len(few) * value for value in seconds[LOOP]]
    kept = f"kept in {short(dtype)}{', BATCHES HALVED' if failed_allocations(device) > failed else ''}"
    scaled = f"{count / len(few):g} x {len(few)} examples, ours differ by {relative_difference(*pair):.0e}"

    def measured(name: str, note: str = "", *, beside: str = "", baseline=seconds[PLAIN], limit: float = NAN) -> Row:
        rate, batch_size = count / median(seconds[name]), 1 if name == LOOP else case.batch_size
        computes = f"{case.what}, {short(dtype)}, batch {batch_size}"
        note = ", ".join(filter(None, [f"{rate:.4g} examples/s", f"peak {in_words(peaks[name])}", note]))
        numbers = {"examples_per_second": rate, "peak_bytes": peaks[name], "share_of_rate": NAN}
        return row(name + beside, computes, seconds[name], baseline, limit, note) | numbers

    limits = (GRADIENTS_LIMIT, LOOP_LIMIT) if case.loss_fn is classification else (NAN, NAN)
    rows = [
        measured(PLAIN),
        measured(OURS, kept, limit=limits[0]),
        measured(OURS, kept, beside=f" / {LOOP}", baseline=seconds[LOOP], limit=limits[1]),
        measured(LOOP, scaled),
    ]
    rows += [measured(name, kept) for name in functions if name == WITH_HEAD]
    if case.loss_fn is completion:
        at_least = {"beside": f" / {LLAMA_LEAST} examples/s", "baseline": [count / LLAMA_LEAST], "limit": 1.0}
        rows.append(measured(OURS, kept, **at_least))
    return rows


def by_turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every function, called in turn, and its peak bytes in one call before, which warms up."""

    def to_the_end(function: Callable[[], object]) -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    peaks = {name: scaling.peak_bytes(function, device) for name, function in functions.items()}
    whole = {name: partial(to_the_end, function) for name, function in functions.items()}
    with progress.off():
        return take_turns(repeats, **whole), peaks


def failed_allocations(device: torch.device) -> int:
    """How often the device has had no memory left, which halves batches."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def short(dtype: torch.dtype) -> str:
    """Its name without torch's before it."""
    return str(dtype).removeprefix("torch.")


# --- 2. Influence against the device's rate of matrix products ------------------------------------------------------


def operations(method: str, n: int, m: int, d: int) -> float:
    """Floating-point operations of a layer; of `exact` where d > n, its Cholesky factor included."""
    product = 2 * m * n * d
    dual = n**2 * d + n**3 / 3 + 2 * n**2 * m
    return {"hessian_free": product, "datainf": 3 * product, "exact": dual + 3 * product}[method]


def benchmark_influence(
    methods: Sequence[str], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int
) -> list[Row]:
    """`influence` of gradients on the device and, by the first method, of those in CPU memory, where they are left.

    The baseline is what the method's operations take at the rate of a square product, in the type it computes in.
    """
    (n, layers, d), m = shape, QUERIES
    names = [f"layer {index}" for index in range(layers)]
    here = [{name: torch.randn(rows, d, device=device, dtype=dtype) for name in names} for rows in (n, m)]
    away = [{name: G.cpu() for name, G in gradients.items()} for gradients in here]
    functions = {method: partial(influence, *here, method) for method in methods}
    functions[f"{methods[0]}, from CPU memory"] = partial(influence, *away, methods[0], device=device)
    size = 4096 if device.type == "cuda" else 256
    types = {name: torch.float64 if name.startswith("exact") else torch.float32 for name in functions}
    rates = {kind: matrix_product_rate(size, device=device, dtype=kind) for kind in set(types.values())}
    seconds, peaks = by_turns(functions, device, repeats)

    rows = []
    computes = f"scores of {m} queries, n = {n}, layers: {layers}, d_l = {d}, kept in {short(dtype)}"
    for name, own in seconds.items():
        rate, limit = rates[types[name]], DATAINF_LIMIT if name == "datainf" else NAN
        at_rate = layers * operations(name.partition(",")[0], n, m, d) / rate
        share, peak = at_rate / median(own), peaks[name]
        note = f"{share:.0%} of {rate / 1e12:.3g} TFLOP/s in {short(types[name])}, TF32 off, peak {in_words(peak)}"
        numbers = {"examples_per_second": n / median(own), "peak_bytes": peak, "share_of_rate": share}
        rows.append(row(name, computes, own, [at_rate], limit, note) | numbers)
    return rows


# --- The record and the command line --------------------------------------------------------------------------------


def parts(tiny: bool, device: torch.device) -> dict[str, Callable[[], list[Row]]]:
    """What can be measured, by name."""
    f32, bf16, where = torch.float32, torch.bfloat16, (device, 2 if tiny else 3)
    of_llama, of_roberta = ((9, 2, 64), (10, 2, 16)) if tiny else ((900, 160, 40960), (4500, 48, 8192))
    several = ("datainf", "hessian_free", "exact")
    return {
        "roberta float32": lambda: benchmark_gradients(roberta(tiny), f32, *where),
        "roberta bfloat16": lambda: benchmark_gradients(roberta(tiny), bf16, *where),
        "llama bfloat16": lambda: benchmark_gradients(llama(tiny), bf16, *where),
        "unet bfloat16": lambda: benchmark_gradients(unet(tiny), bf16, *where),
        "influence llama": lambda: benchmark_influence(several, of_llama, bf16, *where),
        "influence roberta": lambda: benchmark_influence(("exact",), of_roberta, f32, *where),
    }


def attempt(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """The part's rows; where it fails, none, and one line that says why."""
    try:
        return part()
    except (Exception, SystemExit) as error:
        print(f"{name}: FAILED, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", flush=True)
    return []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts asked for, and write the record after each."""
    parser = argparse.ArgumentParser(description="Measure gradients and influence at the paper's sizes on a GPU.")
    parser.add_argument(
        "--only", metavar="PART", help="measure the parts whose names begin so: roberta, llama bfloat16"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU where there is no GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --tiny only (cuda)")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/gpu.csv"), help="the record")
    options = parser.parse_args(arguments)
    if options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a folder, name a CSV file.")
    device = torch.device(options.device if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.exit(2, "These sizes need a CUDA device: run this on a large GPU, or give --tiny.\n")

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    record, failed = pd.DataFrame(), []
    chosen = {name: part for name, part in parts(options.tiny, device).items() if name.startswith(options.only or "")}
    if not chosen:
        parser.error(f"argument --only: no part begins with {options.only!r}.")
    for name, part in chosen.items():
        print(f"{name}: measuring on {device} ...", flush=True)
        torch.manual_seed(0)
        rows = [{"benchmark": name, "scale": "full", **row} for row in attempt(name, part)]
        clear_device_cache(garbage_collection=True)  # of a model that is no longer needed, or did not fit
        if not rows:
            failed.append(name)
            continue
        measured = pd.DataFrame(rows).assign(**({"scale": "tiny", "limit": NAN} if options.tiny else {}))
        record = pd.concat([record, measured])
        show(measured)
        common.write(record, options.output)
    if failed:
        raise SystemExit(f"Not measured: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
