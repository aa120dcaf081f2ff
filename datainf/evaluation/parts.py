"""Parts of a model, by the names of its layers: which of them should be asked?"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from datainf.storage.store import GradientStore

BLOCK = re.compile(r"\b(?:layers?|h|blocks?|block)\.(\d+)\.")
THIRDS = ("low", "middle", "top")
OF_A_UNET = {"down_blocks": "low", "mid_block": "middle", "up_blocks": "top"}


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Part -> its layers, for the parts that have any: the ``head`` (what is trained beside the adapter), ``lora_A``,
    ``lora_B``, and the adapter's ``low``, ``middle`` and ``top`` third of the blocks; of a UNet the way down, the
    middle and the way up."""
    names = list(names)
    adapter = [name for name in names if "lora_" in name]
    numbers = {name: int(found[1]) for name in adapter if (found := BLOCK.search(name))}
    blocks = sorted(set(numbers.values()))

    def third(name: str) -> str | None:
        of_a_unet = next((part for path, part in OF_A_UNET.items() if f".{path}." in name), None)
        return of_a_unet or (THIRDS[3 * blocks.index(numbers[name]) // len(blocks)] if name in numbers else None)

    found = {"head": [name for name in names if "lora_" not in name]}
    found |= {side: [name for name in adapter if f"{side}." in name] for side in ("lora_A", "lora_B")}
    found |= {part: [name for name in adapter if third(name) == part] for part in THIRDS}
    return {part: own for part, own in found.items() if own}


def some_layers(gradients: GradientStore, names: Iterable[str]) -> Mapping[str, Tensor]:
    """The gradients of some layers, in memory."""
    names = list(names)
    return GradientStore(
        {name: gradients[name] for name in names}, shapes={name: gradients.shapes[name] for name in names}
    )
