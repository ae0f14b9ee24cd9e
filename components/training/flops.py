"""The floating-point operations of a training's step, told from its configuration alone.

Its networks are built without memory (torch's meta device), take the global batch forward and backward as the task
does, and torch counts: matrix products, convolutions and attention, whose products torch counts under its plain kernel
alone (SDPBackend.MATH). A multiplication and an addition are two operations, where many papers count one.

Not counted is what costs no product: losses, norms, optimizer, averages. A step that is taken in parts costs a VQ-GAN
and a contrastive encoder one more pass forward, and recomputed activations what they save in memory: both are the price
of little memory and no part of what the model needs, so they are left out, as a model's utilization wants it.

Shapes: B samples of a step, C channels, H W pixels.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.configuration.diffusion import DiffusionTraining
from components.configuration.trainings import (
    AnyTraining,
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.models.autoencoder import Autoencoder
from components.models.contrastive import ContrastiveEncoder
from components.models.losses.adversarial import balanced_generator_loss
from components.models.losses.contrastive import along_gradient, contrastive_gradients
from components.models.losses.reconstruction import image_of
from components.models.perceptual import PerceptualLoss
from components.training.building import IMAGES, make_network
from components.training.perceptual_weights import VGG16_CHANNELS, EfficientNetFeatures, VGG16Features
from components.training.sizes import other_networks, without_memory

Maker = AutoencoderTraining | ContrastiveTraining  # of a frozen network that adds a column to the batch
Columns = Mapping[str, Maker]  # by the name of the column: latents, image_embedding, text_states, text_embedding


def step_flops(
    training: AnyTraining,
    dataset_info: DatasetInfo = IMAGES,
    *,
    grid: TokenGrid | None = None,
    columns: Columns | None = None,
    step: int | None = None,
) -> int:
    """Operations of one whole step: the global batch over all workers, forward and backward, of every network.

    Args:
        dataset_info: what the data set conditions on.
        grid: of the tokens that a prior learns; None for what learns images.
        columns: those of the batch that frozen networks make at each step, by who makes them.
        step: which one (1-based); None: the last, when every loss has begun.

    Raises ValueError for a data set that the training can't learn from, PerceptualWeightsError where the package of its
    perceptual network is missing.
    """
    networks = _networks(training, dataset_info, grid)
    with counting() as counter:
        _train(training, dataset_info, grid, networks, training.optimization.total_steps if step is None else step)
    samples = training.optimization.global_batch_size
    made = (encoding_flops(maker, name, dataset_info, samples=samples) for name, maker in (columns or {}).items())
    return counter.get_total_flops() + sum(made)


class TrainingFlops(NamedTuple):
    """Operations of a training."""

    step: int  # of its last step, when every loss has begun
    total: int  # of all steps


def training_flops(
    training: AnyTraining,
    dataset_info: DatasetInfo = IMAGES,
    *,
    grid: TokenGrid | None = None,
    columns: Columns | None = None,
) -> TrainingFlops:
    """Of a step and of all of them: those of a VQ-GAN are cheaper until its generator hears the discriminator.

    Arguments and errors are those of `step_flops`.
    """
    steps, quiet = training.optimization.total_steps, 0
    if isinstance(training, AutoencoderTraining) and training.losses.adversarial_weight > 0:
        quiet = min(steps, training.losses.discriminator_start)
    known: dict[str, Any] = {"grid": grid, "columns": columns}
    last = step_flops(training, dataset_info, **known)
    first = step_flops(training, dataset_info, **known, step=1) if quiet else last
    return TrainingFlops(last, quiet * first + (steps - quiet) * last)


def encoding_flops(maker: Maker, column: str, dataset_info: DatasetInfo = IMAGES, *, samples: int = 1) -> int:
    """Operations of a frozen network that makes a column of so many samples: `latents`, or `tokens`, of an autoencoder;
    `image_embedding`, `text_states` or `text_embedding` of a contrastive encoder."""
    (network,) = _networks(maker, dataset_info, None)[:1]
    image = _image(samples, 3, maker.data.resolution)
    text = torch.empty(samples, dataset_info.text_length, dtype=torch.long, device="meta")
    with counting() as counter, torch.no_grad():
        if isinstance(network, Autoencoder):
            network.tokenize(image) if column == "tokens" else network.to_latents(image)
        else:
            assert isinstance(network, ContrastiveEncoder)
            network.encode_image(image) if column == "image_embedding" else network.encode_text(text)
    return counter.get_total_flops()


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts what is done inside, on the meta device; tensors that are made there are of it."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def _networks(training: AnyTraining, dataset_info: DatasetInfo, grid: TokenGrid | None) -> list[Any]:
    """The network that is kept, and those that are trained with it; none recomputes its activations."""
    with without_memory():
        return [make_network(training, dataset_info, grid), *other_networks(training, dataset_info)]


def _train(
    training: AnyTraining, dataset_info: DatasetInfo, grid: TokenGrid | None, networks: list[Any], step: int
) -> None:
    """What the task of this training does with the global batch, as far as it costs products."""
    samples = training.optimization.global_batch_size
    conditions = given_conditions(training, dataset_info, samples)
    match training:
        case AutoencoderTraining():
            _train_autoencoder(training, networks[0], [*networks[1:]], heard=step > training.losses.discriminator_start)
        case GANTraining():
            _train_gan(training, networks[0], networks[1], conditions.get("label"))
        case ContrastiveTraining():
            _train_contrastive(networks[0], _image(samples, 3, training.data.resolution), dataset_info.text_length)
        case DiffusionTraining():
            side = training.data.crop_size or training.data.resolution
            conditions |= _images_given(training, side)
            _learn(networks[0], _image(samples, training.data.in_channels, side), torch.empty(samples), **conditions)
        case ClassifierTraining():
            _learn(networks[0], _image(samples, 3, training.data.resolution), torch.empty(samples))
        case DiffusionPriorTraining():
            _learn(
                networks[0], torch.empty(samples, dataset_info.image_embedding_dim), torch.empty(samples), **conditions
            )
        case PriorTraining() | MaskedPriorTraining():
            assert grid is not None
            wanted = {"with_text": True} if isinstance(training, PriorTraining) and training.text_loss_weight else {}
            _learn(networks[0], _ids(samples, grid.height * grid.width), **conditions, **wanted)
        case PixelTraining():
            _learn(networks[0], _values(training, grid), **conditions)


def _learn(network: nn.Module, *inputs: Tensor, **conditions: Any) -> None:
    """One network forward, and backward from all that it returns."""
    output = network(*inputs, **conditions)
    _backward(sum(part.sum() for part in ((output,) if isinstance(output, Tensor) else output)), network)


def _backward(loss: Any, network: nn.Module, *, retain_graph: bool = False) -> None:
    """Backward to what is trained of this network alone, as `Learner.backward`."""
    loss.backward(inputs=[p for p in network.parameters() if p.requires_grad], retain_graph=retain_graph)


def _train_autoencoder(
    training: AutoencoderTraining, network: Autoencoder, judges: list[nn.Module], *, heard: bool
) -> None:
    """As `AutoencoderTask.backward`.

    Args:
        judges: the discriminator, where there is one.
        heard: whether the generator hears it.
    """
    image = _image(training.optimization.global_batch_size, 3, training.data.resolution)
    raw, encoded = network(image, **_draws(training, network, len(image)))
    reconstruction = image_of(raw, kind=training.network.reconstruction)
    loss = raw.sum()
    perceptual = perceptual_loss(training)
    if perceptual is not None:
        loss = loss + perceptual(reconstruction, image).mean()
    for judge in judges:
        logits = judge(torch.cat([image, reconstruction if heard else reconstruction.detach()]))
        if heard:
            balance: dict[str, Any] = {"last_layer": network.last_layer, "adversarial_weight": 1.0}
            fake = logits.chunk(2)[1].mean()
            loss = balanced_generator_loss(raw, nll_loss=loss, adversarial_loss=fake, **balance).loss
        _backward(logits.sum(), judge, retain_graph=True)
    _backward(sum(encoded.losses.values(), start=loss), network)


def _draws(training: AutoencoderTraining, network: Autoencoder, samples: int) -> dict[str, Any]:
    """What the bottleneck draws in training."""
    if training.network.bottleneck.kind == "gaussian":
        return {"noise": torch.empty(samples, *network.latent_shape)}
    if training.network.bottleneck.kind == "gumbel":
        return {"noise": torch.empty(samples, network.codebook_size, *network.grid), "temperature": 1.0}
    return {}


def perceptual_loss(training: AutoencoderTraining) -> PerceptualLoss | None:
    """The frozen network of the loss, without its weights."""
    losses = training.losses
    if losses.perceptual_weight == 0 or losses.perceptual_network == "none":
        return None
    if losses.perceptual_network == "vgg16_lpips":
        return PerceptualLoss(VGG16Features(), layer_weights=[torch.empty(width) for width in VGG16_CHANNELS])
    with torch.device("cpu"):
        features = EfficientNetFeatures()
    return PerceptualLoss(features.to("meta"))


def _train_gan(training: GANTraining, generator: nn.Module, discriminator: nn.Module, label: Tensor | None) -> None:
    """As `GANTask.train_step`: the discriminator learns from parts of the batch in turn, the generator from all."""
    samples, turns = training.optimization.global_batch_size, training.optimization.discriminator_steps
    noise, image = torch.empty(samples, training.network.noise_dim), _image(samples, 3, training.data.resolution)
    for turn in range(turns):
        own = None if label is None else label[turn::turns]
        with torch.no_grad():
            fake = generator(noise[turn::turns], own)
        logits = discriminator(torch.cat([image[turn::turns], fake]), None if own is None else own.repeat(2))
        _backward(logits.sum(), discriminator)
    _backward(discriminator(generator(noise, label), label).sum(), generator)


def _train_contrastive(network: nn.Module, image: Tensor, text_length: int) -> None:
    """As `ContrastiveTask.train_step`: all pairs of the batch meet each other."""
    made = network(image, _ids(len(image), text_length))
    found = contrastive_gradients(made.image.detach(), made.text.detach(), log_scale=made.log_scale)
    pulled = (along_gradient(value, gradient) for value, gradient in zip(made, found[1:], strict=True))
    _backward(sum(pulled), network)


def given_conditions(training: AnyTraining, dataset_info: DatasetInfo, samples: int) -> dict[str, Tensor]:
    """The conditions of a batch that the data set or frozen networks give, by name."""
    conditioning: Any = getattr(training, "conditioning", None)
    names = () if conditioning is None else conditioning.conditions
    condition, width = dataset_info.condition, getattr(conditioning, "text_states_dim", None)
    embedding = getattr(conditioning, "image_embedding_dim", None) or dataset_info.image_embedding_dim
    shapes: dict[str, tuple[int, ...]] = {
        "text_states": (dataset_info.text_states_length, width or dataset_info.text_states_dim),
        "text_embedding": (embedding,),
        "image_embedding": (embedding,),
    }
    ids = {"text": (dataset_info.text_length,), "condition": (condition.height * condition.width,) if condition else ()}
    conditions = {name: torch.empty(samples, *shape) for name, shape in shapes.items() if name in names}
    conditions |= {name: _ids(samples, *shape) for name, shape in ids.items() if name in names}
    return conditions | ({"label": _ids(samples)} if "label" in names else {})


def _images_given(training: DiffusionTraining, side: int) -> dict[str, Tensor]:
    """The images that a diffusion model is given with x_t."""
    samples, conditions = training.optimization.global_batch_size, dict[str, Tensor]()
    if training.image_channels:
        conditions["condition_image"] = _image(samples, training.image_channels, side)
    if training.low_res is not None:
        conditions |= {"low_res": _image(samples, training.data.in_channels, side), "noise_level": _ids(samples)}
    return conditions


def _values(training: PixelTraining, grid: TokenGrid | None) -> Tensor:
    """What a PixelCNN or Row LSTM learns: (B, C, H, W), of one channel where they are tokens."""
    samples, side = training.optimization.global_batch_size, training.data.resolution
    if grid is not None:
        return _ids(samples, 1, grid.height, grid.width)
    assert side is not None
    return _ids(samples, training.data.in_channels, side, side)


def _image(samples: int, channels: int, side: int) -> Tensor:
    return torch.empty(samples, channels, side, side, device="meta")


def _ids(samples: int, *shape: int) -> Tensor:
    return torch.empty(samples, *shape, dtype=torch.long, device="meta")
