"""What gradients are of, in short strings: by these a store is told from another."""

import hashlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import joblib
import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import nn

from datainf.storage.rows import double_on

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, re.Pattern, range)


def identity(model: nn.Module, dataset: Sequence, loss_fn: Callable, collate_fn: Callable) -> dict[str, str]:
    """Short fingerprints of what the gradients are of: trainable weights, base (its buffers and the scaling of adapters
    among it), examples in their order, loss, and how a batch is made."""
    weights, base, examples = (hashlib.sha256() for _ in range(3))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights.update(name.encode())
            weights.update(joblib.hash(parameter.detach().cpu().float().numpy()).encode())
    # The frozen base may be huge: its names, shapes and one sum per matrix tell two bases apart.
    frozen = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for name, tensor in (*frozen, *model.named_buffers()):
        total = tensor.detach().to(double_on(tensor.device)).sum(dtype=torch.float64).item()
        base.update(f"{name} {tuple(tensor.shape)} {total:.6e}".encode())
    base.update(repr(model).encode())
    for name, module in model.named_modules():
        base.update(f"{name} {getattr(module, 'scaling', '')}".encode())
    for index in range(len(dataset)):
        # As arrays: a tensor's pickle depends on where in memory it is.
        example = recursively_apply(lambda tensor: tensor.cpu().numpy(), dataset[index])
        examples.update(joblib.hash(example).encode())
    return {
        "weights": weights.hexdigest()[:16],
        "base": base.hexdigest()[:16],
        "examples": examples.hexdigest()[:16],
        "loss": f"{name_of(loss_fn)} {fingerprint(loss_fn)}",
        "collate_fn": f"{name_of(collate_fn)} {fingerprint(collate_fn)}",
    }


def name_of(function: Callable) -> str:
    """A function's name, with the plain arguments that functools.partial has bound to it."""
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in sorted(function.keywords.items()))]
        return f"{name_of(function.func)}({', '.join(_without_address(text) for text in bound)})"
    return getattr(function, "__qualname__", type(function).__qualname__)


def fingerprint(thing: object) -> str:
    """A hash of what a function does, as far as it can be seen: its code, constants, defaults and closure, the plain
    globals and functions of its own module that it names; of an object, its class's code and its state."""
    return hashlib.sha256("\n".join(_facts(thing, {})).encode()).hexdigest()[:16]


def _facts(thing: object, seen: dict[int, object]) -> Iterator[str]:
    """Lines of text that are the same for the same thing, in this process or another."""
    if isinstance(thing, PLAIN):
        yield repr(thing)
        return
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # kept, so that no other gets its number
    yield type(thing).__qualname__
    if isinstance(thing, torch.Tensor | np.ndarray):
        yield joblib.hash(np.asarray(thing.detach().cpu().float() if isinstance(thing, torch.Tensor) else thing))
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from (*_facts(key, seen), *_facts(value, seen))
    elif isinstance(thing, set | frozenset):
        yield from sorted(map(repr, thing))
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from _facts(item, seen)
    elif isinstance(thing, partial):
        yield from (*_facts(thing.func, seen), *_facts(thing.args, seen), *_facts(thing.keywords, seen))
    elif isinstance(thing, types.MethodType):
        yield from (*_facts(thing.__func__, seen), *_facts(thing.__self__, seen))
    elif isinstance(thing, types.CodeType):
        yield from (thing.co_code.hex(), repr(thing.co_names))
        yield from _facts(thing.co_consts, seen)
    elif isinstance(thing, types.FunctionType):
        yield from _function_facts(thing, seen)
    elif isinstance(thing, nn.Module):
        yield repr(thing)
        yield from _facts(thing.state_dict(), seen)
    elif hasattr(thing, "special_tokens_map"):  # a tokenizer, which has state that every use changes
        yield f"{thing.special_tokens_map} {len(thing)} {thing.padding_side} {thing.truncation_side}"
    elif isinstance(thing, type | types.BuiltinFunctionType | types.ModuleType):
        yield getattr(thing, "__qualname__", thing.__name__)
    else:
        yield from _facts({k: v for k, v in vars(type(thing)).items() if isinstance(v, types.FunctionType)}, seen)
        yield from _facts(vars(thing), seen) if hasattr(thing, "__dict__") else [_without_address(repr(thing))]


def _function_facts(function: types.FunctionType, seen: dict[int, object]) -> Iterator[str]:
    yield function.__qualname__
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    for part in (function.__code__, function.__defaults__, function.__kwdefaults__, cells):
        yield from _facts(part, seen)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        of_its_module = isinstance(value, types.FunctionType) and value.__module__ == function.__module__
        if of_its_module or (value is not None and isinstance(value, PLAIN)):
            yield name
            yield from _facts(value, seen)


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
