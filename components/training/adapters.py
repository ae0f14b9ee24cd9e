"""Low-rank adapters (LoRA): W + alpha / rank * B A, of which A and B alone are trained.

Hu et al. (2021), equation 3. By peft, an optional package, whose layers take the place of linear maps and convolutions
in the network itself. B is zero at first: a training begins at the weights to start from. A finished model has the
merged weights and no trace of an adapter; A and B lie beside them in peft's own files."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from components.configuration.optimization import AdapterConfig
from components.weights.starts import is_below

FOLDER, TENSORS = "adapter", "adapter_model.safetensors"  # the name that peft looks for
NAME = "default"  # of the only adapter, in names of tensors
PREFIX = "base_model.model."  # of names in peft's files


class AdapterError(ValueError):
    """An adapter can't be added; the message says why."""


def check_adapters() -> None:
    """Raise AdapterError if peft is not installed."""
    if find_spec("peft") is None:
        raise AdapterError("an adapter needs peft: pip install 'image-cascade[adapters]'")


def add_adapter(network: nn.Module, config: AdapterConfig, *, new: Sequence[str] = ()) -> None:
    """Add an adapter to a network, in place; only it and the modules `new`, which get none, are trained.
    Raises AdapterError without peft, and for targets that the network does not have, or that take no adapter."""
    check_adapters()
    from peft import inject_adapter_in_model  # takes seconds

    try:
        inject_adapter_in_model(lora_config(config, new), network, adapter_name=NAME)
    except ValueError as error:
        names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
        absent = names.isdisjoint(config.targets)
        why = "no module is named as one of" if absent else "not every module is linear or a convolution among"
        raise AdapterError(f"adapter: {why} {', '.join(config.targets)}; set adapter.targets") from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name or is_below(name, new))


def lora_config(config: AdapterConfig, new: Sequence[str] = ()) -> Any:
    """Peft's own configuration."""
    from peft import LoraConfig

    excluded = "|".join(map(re.escape, new))
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=[*config.targets],
        exclude_modules=rf"({excluded})(\..*)?" if new else None,
    )


def merge_adapter(network: nn.Module, config: AdapterConfig, folder: Path) -> None:
    """Add the adapter to the weights, in place, and take its layers out.
    A and B are written with their configuration as peft reads them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors = {
        PREFIX + name.replace(f".{NAME}.", "."): tensor.detach().clone().contiguous()
        for name, tensor in network.state_dict().items()
        if ".lora_" in name
    }
    for name, module in [*network.named_modules()]:
        if isinstance(module, BaseTunerLayer):
            module.merge()
            network.set_submodule(name, module.get_base_layer())
    lora_config(config).save_pretrained(folder / FOLDER)
    save_file(tensors, folder / FOLDER / TENSORS)
