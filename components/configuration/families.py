"""All trainable model families, a row for each: the only place that tells families apart by name.

To add a family, write its network and sampling (`components.models`, `components.sampling.generators`), a subclass of
`Training` and a task, then add a row here and one each to `components.models.bundle.NETWORKS` and
`components.training.step_model.TASKS`. `train_model` trains it, and `cascade plan` counts its memory and operations.
"""

from typing import Literal, NamedTuple

from components.configuration.diffusion import DiffusionTraining
from components.configuration.optimization import Training
from components.configuration.sampling import (
    ClassifierSampling,
    DiffusionPriorSampling,
    DiffusionSampling,
    GANSampling,
    MaskedTokenSampling,
    ModelSampling,
    RerankerSampling,
    TokenSampling,
    TransformerSampling,
)
from components.configuration.trainings import (
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    DiffusionPriorTraining,
    GANTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)


class Family(NamedTuple):
    """A kind of trainable model: networks, sampling settings, and abilities."""

    title: str
    training: type[Training]
    networks: tuple[str, ...]  # kinds, keys of `components.models.bundle.NETWORKS`
    sampling: type[ModelSampling] | None = None  # settings of the sampler; None: a sampler without settings
    stored: str = ""  # of a task with several networks, the prefix of the one that is stored
    whole: str | None = None  # reason why the network can't be cut into shards; None: shards work
    likelihood: Literal["exact", "bound"] | None = None  # of whole images
    alone: bool = False  # makes images without another model
    reconstructs: bool = False  # shown by reconstructions of held-out images


FAMILIES: dict[str, Family] = {
    "autoencoder": Family(
        "Autoencoder",
        AutoencoderTraining,
        ("autoencoder",),
        stored="generator.",
        whole="its codes move by averages, and its adaptive weight is a ratio of gradients of one whole layer",
        likelihood="bound",
        alone=True,
        reconstructs=True,
    ),
    "prior": Family("Transformer over tokens", PriorTraining, ("transformer",), TransformerSampling),
    "masked_prior": Family(
        "Masked transformer over tokens", MaskedPriorTraining, ("masked_transformer",), MaskedTokenSampling
    ),
    "pixels": Family(
        "PixelCNN and Row LSTM",
        PixelTraining,
        ("pixelcnn", "row_lstm"),
        TokenSampling,
        whole="its samplers read weights outside of a forward pass",
        likelihood="exact",
        alone=True,
    ),
    "gan": Family(
        "GAN",
        GANTraining,
        ("gan",),
        GANSampling,
        stored="generator.",
        whole="its spectral norms need whole weights",
        alone=True,
    ),
    "diffusion": Family("Diffusion", DiffusionTraining, ("unet", "image_attention_unet", "dit"), DiffusionSampling),
    "diffusion_prior": Family("Diffusion prior", DiffusionPriorTraining, ("diffusion_prior",), DiffusionPriorSampling),
    "classifier": Family("Classifier", ClassifierTraining, ("classifier",), ClassifierSampling),
    "contrastive": Family("Contrastive encoder", ContrastiveTraining, ("contrastive",), RerankerSampling),
}


def family_name(kind: str) -> str:
    """Key in FAMILIES of the family with networks of a kind. Raises ValueError for an unknown kind."""
    for name, family in FAMILIES.items():
        if kind in family.networks:
            return name
    raise ValueError(f"no model family has a network of kind {kind!r}; add it to components/configuration/families.py")


def family_of(kind: str) -> Family:
    """The family with networks of the given kind. Raises ValueError for an unknown kind."""
    return FAMILIES[family_name(kind)]
