"""Networks as programs that run without this project: files of torch.export and of ONNX.

A program is one function of a network for any batch size, with the weights inside: torch.export.load(file).module() is
called with inputs in order, a session of onnxruntime with inputs by name. Each is compared with the network, on a batch
of another size than it was traced on, before anything is written. Sizes of images are those of the model."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from components.models.bundle import ModelBundle

Form = Literal["pt2", "onnx"]
LIST = "programs.json"
TRACED, COMPARED = 2, 3  # images of the traced batch, and of the compared
TOLERANCE = 1e-5  # of the greatest difference, in units of the greatest output
TIMES = 1000  # of the times that are tried
WORDS = 7  # of texts of any length


class Inputs:
    """Random inputs of a model by name, the same each time; `ints` are in [1, high), floats are normal."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.sizes, self.settings, self.module = bundle.network, bundle.settings, cast("Any", bundle.module)
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

    def label(self) -> None:
        """A label, of a model that has classes."""
        if self.sizes.get("num_classes"):
            self.ints("label", self.sizes["num_classes"])

    def caption(self) -> None:
        self.ints("text", self.sizes["text"]["vocab_size"], self.sizes["text"]["context_length"])


class Program(NamedTuple):
    """A function of networks of these kinds, and its inputs."""

    kinds: tuple[str, ...]  # keys of `components.models.bundle.NETWORKS`
    name: str  # of the file
    method: str  # of the network
    fill: Callable[[Inputs], None]  # adds the inputs; none for a network without the function


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


def of_denoiser(inputs: Inputs) -> None:
    """x_t, time and the conditions of `ConditionedNetwork`."""
    sizes, side = inputs.sizes, inputs.sizes["resolution"]
    channels = sizes.get("in_channels", 3)
    inputs.floats("x_t", channels, side, side)
    inputs.times()
    for name in getattr(inputs.module, "conditions", ()):
        if name == "label":
            inputs.label()
        elif name == "text":
            inputs.caption()
        elif name == "text_states":
            inputs.any_length.add(name)
            inputs.floats(name, WORDS, sizes["text_states_dim"])
        elif name == "noise_level":
            inputs.ints(name, TIMES)
        elif name == "image_embedding":
            inputs.floats(name, sizes["image_embedding_dim"])
        else:  # an image beside x_t
            inputs.floats(name, channels if name == "low_res" else sizes["condition_image_channels"], side, side)


def of_image(inputs: Inputs) -> None:
    side, classes = inputs.sizes["resolution"], getattr(inputs.module, "map_classes", 0)
    if not classes:
        inputs.floats("image", 1 if getattr(inputs.module, "image_channels", 3) == 1 else 3, side, side)
        return
    inputs.ints("image", classes, 1, side, side)  # a map, as it is read: grays of classes
    image = 2 * inputs.tensors["image"] / (classes - 1) - 1
    inputs.tensors["image"] = image.expand(-1, 3, -1, -1).contiguous()


def of_codes(inputs: Inputs) -> None:
    if not inputs.module.is_gaussian:
        of_image(inputs)


def of_indices(inputs: Inputs) -> None:
    if not inputs.module.is_gaussian:
        inputs.ints("indices", inputs.module.codebook_size, *inputs.module.grid)


def of_latents(inputs: Inputs) -> None:
    inputs.floats("latents", *inputs.module.diffused_shape)


def of_tokens(inputs: Inputs) -> None:
    sizes = inputs.sizes
    inputs.ints("tokens", sizes["codebook_size"], sizes["num_tokens"])
    inputs.label()
    if sizes.get("vocab_size"):
        inputs.ints("text", sizes["vocab_size"], sizes["text_length"])
    if sizes.get("condition_codebook_size"):
        inputs.ints("condition", sizes["condition_codebook_size"], math.prod(sizes["condition_grid"]))


def of_values(inputs: Inputs) -> None:
    grid = inputs.settings.get("grid") or [inputs.settings["resolution"]] * 2
    inputs.ints("values", inputs.sizes["num_values"], inputs.sizes["num_channels"], *grid)
    inputs.label()


def of_generator(inputs: Inputs) -> None:
    inputs.floats("noise", inputs.sizes["noise_dim"])
    inputs.label()


def of_embedding(inputs: Inputs) -> None:
    """The noised embedding of an image, the time, and a text's states and embedding."""
    sizes = inputs.sizes
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
    Program(("contrastive",), "encode_text", "encode_text", Inputs.caption),
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


@torch.no_grad()
def exported(bundle: ModelBundle) -> Iterator[Exported]:
    """The programs of a model, for any batch size.
    Raises ValueError if one's outputs differ by more than TOLERANCE from the network's."""
    batch, length = Dim("batch"), Dim("length")
    for each in PROGRAMS:
        inputs = Inputs(bundle)
        tensors = inputs.tensors
        if bundle.kind in each.kinds:
            each.fill(inputs)
        if not tensors:
            continue
        call, given = MethodCall(bundle.module, each.method, tuple(tensors)), tuple(tensors.values())
        free = {name: {0: batch} | ({1: length} if name in inputs.any_length else {}) for name in tensors}
        example = tuple(tensor[:TRACED] for tensor in given)
        program = torch.export.export(call, example, dynamic_shapes=(tuple(free.values()),))
        check_equal(each.name, program.module()(*given), call(*given))
        yield Exported(each.name, program, {name: described(tensors[name], free[name]) for name in tensors})


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
    """Keeps warnings of the exporters from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
