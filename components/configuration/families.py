"""All trainable model families, a row for each: the only place that tells families apart by name.

To add a family, write its network and sampling (`components.models`, `components.sampling.generators`), a subclass of
`Training` and a task, then add a row here, to `components.models.bundle.NETWORKS` and to
`components.training.step_model.TASKS`."""

from typing import Literal, NamedTuple

from components.configuration import sampling, trainings
from components.configuration.diffusion import DiffusionTraining
from components.configuration.optimization import Training
from components.configuration.sampling import ModelSampling


class Family(NamedTuple):
    """A kind of trainable model: networks, sampling settings, and abilities."""

    title: str
    training: type[Training]
    networks: tuple[str, ...]  # kinds, keys of `components.models.bundle.NETWORKS`
    sampling: type[ModelSampling] | None = None  # settings of the sampler, if any
    stored: str = ""  # prefix of the stored network, of a task with several
    whole: str | None = None  # reason why the network can't be cut into shards; None: shards work
    likelihood: Literal["exact", "bound"] | None = None  # of whole images
    alone: bool = False  # makes images without another model
    reconstructs: bool = False  # shown by reconstructions of held-out images


FAMILIES: dict[str, Family] = {
    "autoencoder": Family(
        "Autoencoder",
        trainings.AutoencoderTraining,
        ("autoencoder",),
        stored="generator.",
        whole="its codes move by averages, and its adaptive weight is a ratio of gradients of one whole layer",
        likelihood="bound",
        alone=True,
        reconstructs=True,
    ),
    "prior": Family("Transformer over tokens", trainings.PriorTraining, ("transformer",), sampling.TransformerSampling),
    "masked_prior": Family(
        "Masked transformer over tokens",
        trainings.MaskedPriorTraining,
        ("masked_transformer",),
        sampling.MaskedTokenSampling,
    ),
    "pixels": Family(
        "PixelCNN and Row LSTM",
        trainings.PixelTraining,
        ("pixelcnn", "row_lstm"),
        sampling.TokenSampling,
        whole="its samplers read weights outside of a forward pass",
        likelihood="exact",
        alone=True,
    ),
    "gan": Family(
        "GAN",
        trainings.GANTraining,
        ("gan",),
        sampling.GANSampling,
        stored="generator.",
        whole="its spectral norms need whole weights",
        alone=True,
    ),
    "diffusion": Family(
        "Diffusion", DiffusionTraining, ("unet", "image_attention_unet", "dit"), sampling.DiffusionSampling
    ),
    "diffusion_prior": Family(
        "Diffusion prior", trainings.DiffusionPriorTraining, ("diffusion_prior",), sampling.DiffusionPriorSampling
    ),
    "classifier": Family("Classifier", trainings.ClassifierTraining, ("classifier",), sampling.ClassifierSampling),
    "contrastive": Family(
        "Contrastive encoder", trainings.ContrastiveTraining, ("contrastive",), sampling.RerankerSampling
    ),
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
