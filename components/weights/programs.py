"""Networks as programs that run without this project: files of torch.export and of ONNX.

A program is one function of a network for any batch size, with the weights inside: torch.export.load(file).module() is
called with inputs in order, a session of onnxruntime with inputs by name. Each is compared with the network, on a batch
of another size than it was traced on, before anything is written. Sizes of images are those of the model.

Shapes: B batch, C channels, H W height and width, E features, L length of a text."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from components.models.bundle import ModelBundle

Form = Literal["pt2", "onnx"]
LIST = "programs.json"
TRACED, COMPARED = 2, 3  # images of the batch that is traced, and of that which is compared
TOLERANCE = 1e-5  # of the greatest difference, in units of the greatest output
TIMES = 1000  # of the times that are tried
WORDS = 7  # of texts of any length


class Inputs:
    """Random inputs by name, the same each time; `ints` are in [1, high), floats are normal."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.tensors: dict[str, Tensor] = {}
        self.any_length: set[str] = set()  # names of texts of any length

    def floats(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.randn(COMPARED, *shape, generator=self.generator)

    def ints(self, name: str, high: int, *shape: int) -> None:
        self.tensors[name] = torch.randint(min(1, high - 1), high, (COMPARED, *shape), generator=self.generator)

    def times(self) -> None:
        """Times of any process: as floats, whole ones too."""
        self.ints("time", TIMES)
        self.tensors["time"] = self.tensors["time"].float()


class Program(NamedTuple):
    """A function of networks of these kinds, and its inputs."""

    kinds: tuple[str, ...]  # keys of `components.models.bundle.NETWORKS`
    name: str  # of the file
    method: str  # of the network
    fill: Callable[[Inputs, ModelBundle], None]  # adds the inputs; none for a network without the function


class Exported(NamedTuple):
    """A program whose outputs are those of the network."""

    name: str
    program: ExportedProgram
    inputs: dict[str, list[Any]]  # by name, in order: sizes, "batch" and "length" where there is any


class MethodCall(nn.Module):
    """A method of a network as a module of positional inputs; its output is a tensor or a plain tuple."""

    def __init__(self, network: nn.Module, method: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.method, self.names = network, method, names

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = getattr(self.network, self.method)(**dict(zip(self.names, inputs, strict=True)))
        return tuple(found) if isinstance(found, tuple) else found


def of_denoiser(inputs: Inputs, bundle: ModelBundle) -> None:
    """x_t, time and the conditions of `ConditionedNetwork`."""
    sizes, module = bundle.network, bundle.module
    channels, side = sizes.get("in_channels", 3), sizes["resolution"]
    inputs.floats("x_t", channels, side, side)
    inputs.times()
    for name in getattr(module, "conditions", ()):
        if name == "label":
            inputs.ints(name, sizes["num_classes"])
        elif name == "text":
            inputs.ints(name, sizes["text"]["vocab_size"], sizes["text"]["context_length"])
        elif name == "text_states":
            inputs.any_length.add(name)
            inputs.floats(name, WORDS, sizes["text_states_dim"])
        elif name == "noise_level":
            inputs.ints(name, TIMES)
        elif name == "image_embedding":
            inputs.floats(name, sizes["image_embedding_dim"])
        else:  # an image beside x_t
            inputs.floats(name, channels if name == "low_res" else sizes["condition_image_channels"], side, side)


def of_image(inputs: Inputs, bundle: ModelBundle) -> None:
    inputs.floats("image", 3, bundle.network["resolution"], bundle.network["resolution"])


def of_codes(inputs: Inputs, bundle: ModelBundle) -> None:
    """An image for an autoencoder with codes."""
    autoencoder: Any = bundle.module
    if not autoencoder.is_gaussian:
        of_image(inputs, bundle)


def of_indices(inputs: Inputs, bundle: ModelBundle) -> None:
    """Indices of codes, of an autoencoder that has some."""
    autoencoder: Any = bundle.module
    if not autoencoder.is_gaussian:
        inputs.ints("indices", autoencoder.codebook_size, *autoencoder.grid)


def of_latents(inputs: Inputs, bundle: ModelBundle) -> None:
    """Latents of an autoencoder."""
    autoencoder: Any = bundle.module
    inputs.floats("latents", *autoencoder.diffused_shape)


def of_tokens(inputs: Inputs, bundle: ModelBundle) -> None:
    """Tokens of images after those of the conditions."""
    sizes = bundle.network
    inputs.ints("tokens", sizes["codebook_size"], sizes["num_tokens"])
    if sizes.get("num_classes"):
        inputs.ints("label", sizes["num_classes"])
    if sizes.get("vocab_size"):
        inputs.ints("text", sizes["vocab_size"], sizes["text_length"])
    if sizes.get("condition_codebook_size"):
        inputs.ints("condition", sizes["condition_codebook_size"], math.prod(sizes["condition_grid"]))


def of_values(inputs: Inputs, bundle: ModelBundle) -> None:
    """Values of images, or tokens in their grid."""
    sizes, learned = bundle.network, bundle.settings
    grid = learned["grid"] if "grid" in learned else [learned["resolution"]] * 2
    inputs.ints("values", sizes["num_values"], sizes["num_channels"], *grid)
    if sizes.get("num_classes"):
        inputs.ints("label", sizes["num_classes"])


def of_generator(inputs: Inputs, bundle: ModelBundle) -> None:
    inputs.floats("noise", bundle.network["noise_dim"])
    if bundle.network.get("num_classes"):
        inputs.ints("label", bundle.network["num_classes"])


def of_caption(inputs: Inputs, bundle: ModelBundle) -> None:
    text = bundle.network["text"]
    inputs.ints("text", text["vocab_size"], text["context_length"])


def of_embedding(inputs: Inputs, bundle: ModelBundle) -> None:
    """The noised embedding of an image, the time, and a text's states and embedding."""
    sizes = bundle.network
    inputs.floats("x_t", sizes["embedding_dim"])
    inputs.times()
    inputs.floats("text_states", sizes["text_length"], sizes["text_dim"])
    inputs.floats("text_embedding", sizes["embedding_dim"])


PROGRAMS = (
    Program(("unet", "image_attention_unet", "dit", "classifier"), "network", "forward", of_denoiser),
    Program(("autoencoder",), "encode", "to_latents", of_image),
    Program(("autoencoder",), "decode", "from_latents", of_latents),
    Program(("autoencoder",), "tokenize", "tokenize", of_codes),
    Program(("autoencoder",), "detokenize", "detokenize", of_indices),
    Program(("transformer", "masked_transformer"), "network", "forward", of_tokens),
    Program(("pixelcnn", "row_lstm"), "network", "forward", of_values),
    Program(("gan",), "network", "forward", of_generator),
    Program(("contrastive",), "encode_image", "encode_image", of_image),
    Program(("contrastive",), "encode_text", "encode_text", of_caption),
    Program(("diffusion_prior",), "network", "forward", of_embedding),
)


def write_programs(bundle: ModelBundle, folder: Path, form: Form) -> list[str]:
    """Writes the programs of a model and their inputs; returns the names of the files.
    Raises ValueError, before it writes, if the libraries of ONNX are missing or a program computes something else."""
    if form == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ValueError("ONNX needs its libraries: pip install 'image-cascade[export]', or take --as pt2")
    with quiet():
        made = list(exported(bundle))
        for name, program, inputs in made:
            if form == "pt2":
                torch.export.save(program, folder / f"{name}.pt2")
            else:
                onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[*inputs])
                assert onnx is not None
                onnx.save(folder / f"{name}.onnx")  # weights above two gigabytes go to a file beside it
    listed = {f"{each.name}.{form}": {"inputs": each.inputs} for each in made}
    (folder / LIST).write_text(json.dumps({"kind": bundle.kind, "settings": bundle.settings, "programs": listed}))
    return [*listed]


def exported(bundle: ModelBundle) -> Iterator[Exported]:
    """The programs of a model. Raises ValueError if one computes something else than the network."""
    for each in PROGRAMS:
        inputs = Inputs()
        if bundle.kind in each.kinds:
            each.fill(inputs, bundle)
        if inputs.tensors:
            call = MethodCall(bundle.module, each.method, tuple(inputs.tensors))
            yield traced(each.name, call, inputs)


@torch.no_grad()
def traced(name: str, call: nn.Module, inputs: Inputs) -> Exported:
    """A module as a program for any batch size.
    Raises ValueError if its outputs differ by more than TOLERANCE."""
    batch, length = Dim("batch"), Dim("length")
    tensors = inputs.tensors
    free = {each: {0: batch} | ({1: length} if each in inputs.any_length else {}) for each in tensors}
    example = tuple(tensor[:TRACED] for tensor in tensors.values())
    program = torch.export.export(call, example, dynamic_shapes=(tuple(free.values()),))
    check_equal(name, program.module()(*tensors.values()), call(*tensors.values()))
    return Exported(name, program, {each: described(tensors[each], free[each]) for each in tensors})


def described(tensor: Tensor, free: Mapping[int, Any]) -> list[Any]:
    """Type and sizes of an input, with the names of sizes that may be any."""
    sizes = [free[axis].__name__ if axis in free else size for axis, size in enumerate(tensor.shape)]
    return [str(tensor.dtype).removeprefix("torch."), *sizes]


def check_equal(name: str, found: Any, wanted: Any) -> None:
    """Raise ValueError if outputs differ."""
    pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
    for one, other in pairs:
        difference = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
        if not difference <= TOLERANCE:
            raise ValueError(f"the exported {name} differs by {difference:.1e} from the network: nothing is written")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings of the exporters about code of ours and of theirs from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
