"""Trainings of autoencoders, GAN, classifier, CLIP and diffusion prior, and the unions for recipes."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from components.configuration import networks
from components.configuration.conditions import (
    IMAGES,
    DatasetInfo,
    LabelConditions,
    Member,
    PriorConditions,
    TextConfig,
    TokenGrid,
)
from components.configuration.config import Config, Since, refuse
from components.configuration.diffusion import DiffusionTraining, DiscreteNoise, DiscreteProcess, Noise
from components.configuration.optimization import (
    AdversarialOptimization,
    ClassifierOptimization,
    GANOptimization,
    PerceptualNetwork,
    Training,
    TrainingNeeds,
)
from components.configuration.priors import MaskedPriorTraining, PixelTraining, PriorTraining


class AutoencoderData(Config):
    """Resolution and image member of the data of an autoencoder."""

    resolution: int = Field(ge=8)  # pixels
    member: Member = "image"  # member of each sample to use as image


class AutoencoderLosses(Config):
    """Loss weights that tell apart VAE, VAE-GAN, VQ-VAE, dVAE and VQ-GAN."""

    commitment_cost: float = Field(0.25, ge=0)
    kl_weight: float = Field(1.0, ge=0)  # of gaussian and gumbel; 1 is the bound of a likelihood
    kl_warmup_steps: int = Field(0, ge=0)  # from 0 to kl_weight along a cosine
    temperature_steps: int = Field(0, ge=0)  # of gumbel: from 1 to final_temperature along a cosine
    final_temperature: float = Field(1 / 16, gt=0, le=1)
    perceptual_network: PerceptualNetwork
    perceptual_weights_uri: str | None = None  # where the weights are, for networks that no package ships
    perceptual_weight: float = Field(1.0, ge=0)  # 0: the perceptual network is not loaded
    adversarial_weight: float = Field(0.8, ge=0)  # on the adaptive weight; 0: no discriminator
    discriminator_start: int = Field(0, ge=0)  # the generator hears it from then on; it learns from step 1
    discriminator_channels: int = Field(64, ge=4)
    discriminator_layers: int = Field(3, ge=1)

    def _check(self) -> None:
        lacking = self.perceptual_network == "vgg16_lpips" and self.perceptual_weights_uri is None
        refuse(lacking, "perceptual_network vgg16_lpips needs perceptual_weights_uri (its weights are no package)")


class AutoencoderTraining(Training):
    """Training of an autoencoder and, for an adversarial weight above zero, of a discriminator."""

    stage_version = 3  # the bottleneck is a part of its network
    can_adapt = False  # the adaptive weight is a ratio of gradients of the last layer
    can_freeze = True

    network: networks.AutoencoderNetworkConfig
    losses: AutoencoderLosses
    data: AutoencoderData
    optimization: AdversarialOptimization

    def _check(self) -> None:
        if self.network.reads_classes:
            seen = self.needs().perceptual_network != "none" or self.losses.adversarial_weight > 0
            refuse(self.data.member != "mask", "reconstruction classes is of maps of classes: set member=mask")
            refuse(seen, "maps of classes have no losses of images: set perceptual_weight=0 and adversarial_weight=0")

    @property
    def stage_name(self) -> str:
        return "tokenizer" if self.has_codes else "vae"

    @property
    def has_codes(self) -> bool:
        return self.network.bottleneck.kind != "gaussian"

    @property
    def token_grid(self) -> TokenGrid | None:
        codes, side = self.network.bottleneck, self.data.resolution // self.network.factor
        return TokenGrid(codebook_size=codes.codebook_size, height=side, width=side) if codes.codebook_size else None

    @property
    def quiet_steps(self) -> int:
        start = self.losses.discriminator_start if self.losses.adversarial_weight > 0 else 0
        return min(start, self.optimization.total_steps)

    def check_likelihood(self) -> None:
        """Raises ValueError unless the bottleneck is Gaussian and the reconstruction has a likelihood."""
        none = self.has_codes or self.network.reconstruction != "discretized_logistic"
        refuse(none, "likelihood needs model.bottleneck gaussian and model.reconstruction discretized_logistic")

    def needs(self) -> TrainingNeeds:
        losses = self.losses
        return TrainingNeeds(
            self.data.resolution,
            member=self.data.member,
            mask_values=self.network.image_channels if self.network.reads_classes else None,
            perceptual_network=losses.perceptual_network if losses.perceptual_weight > 0 else "none",
            perceptual_weights_uri=losses.perceptual_weights_uri,
        )

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        return super().network_arguments(dataset_info, grid) | {"resolution": self.data.resolution}

    def discriminator_arguments(self, dataset_info: DatasetInfo = IMAGES) -> dict[str, Any] | None:
        losses = self.losses
        if losses.adversarial_weight == 0:
            return None
        return {"channels": losses.discriminator_channels, "num_layers": losses.discriminator_layers}

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {"resolution": self.data.resolution, "member": self.data.member}


class ImageData(Config):
    """Whole images."""

    resolution: int = Field(ge=4)  # pixels


class AdversaryConfig(Config):
    """The discriminator of a GAN."""

    discriminator_channels: int = Field(ge=4)
    discriminator_channel_mult: tuple[int, ...] = Field(min_length=1)
    augment: bool = False  # differentiable, of all that the discriminator sees, for small sets


class GANTraining(Training):
    """Class-conditional residual GAN (Brock et al., 2019): generator, discriminator, and losses."""

    can_adapt = False  # its spectral norms need whole weights

    network: networks.GANConfig
    adversary: AdversaryConfig
    conditioning: LabelConditions = LabelConditions()
    data: ImageData
    optimization: GANOptimization

    def _check(self) -> None:
        side, own, other = self.data.resolution, self.network.channel_mult, self.adversary.discriminator_channel_mult
        for name, levels in {"channel_mult": own, "discriminator_channel_mult": other}.items():
            refuse(side % 2 ** len(levels), f"resolution {side} can't be halved once for each level of {name}")

    def needs(self) -> TrainingNeeds:
        return TrainingNeeds(self.data.resolution)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        return super().network_arguments(dataset_info, grid) | {
            "resolution": self.data.resolution,
            "num_classes": self.conditioning.num_classes(dataset_info),
        }

    def discriminator_arguments(self, dataset_info: DatasetInfo = IMAGES) -> dict[str, Any]:
        return {
            "resolution": self.data.resolution,
            "channels": self.adversary.discriminator_channels,
            "channel_mult": self.adversary.discriminator_channel_mult,
            "num_classes": self.conditioning.num_classes(dataset_info),
            "attention_resolutions": self.network.attention_resolutions,
        }

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {"resolution": self.data.resolution, "classes": list(classes)}


class ShiftedData(ImageData):
    """Images, moved at random in training."""

    max_shift: int = Field(0, ge=0)  # pixels that images are moved by, at most and each way


class AugmentedData(ShiftedData):
    """Images or latents, moved and mirrored at random in training."""

    mirror: bool = False  # half of the images are mirrored
    in_channels: Annotated[int, Since(3)] = Field(3, ge=1)  # 3: colors; others: latents


class ClassifierTraining(Training):
    """Classifier of noisy images, for guidance (Dhariwal and Nichol, 2021), or of clean ones, to measure."""

    network: networks.ClassifierNetworkConfig
    noisy: bool = True  # False: it sees clean images only, and guides nothing
    process: Noise = DiscreteNoise()  # that of the diffusion model that it guides
    data: AugmentedData
    optimization: ClassifierOptimization

    def _check(self) -> None:
        side, levels = self.data.resolution, len(self.network.channel_mult)
        refuse(side % 2 ** (levels - 1), f"resolution {side} can't be halved between the levels of channel_mult")
        strange = self.data.in_channels == 1 or (self.data.in_channels != 3 and not self.noisy)
        refuse(strange, "in_channels must be 3, or those of the latents that a classifier with noisy=true guides")

    def needs(self) -> TrainingNeeds:
        return TrainingNeeds(self.data.resolution, channels=self.data.in_channels)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        own = super().network_arguments(dataset_info, grid) | {"num_classes": dataset_info.num_classes}
        return own | self.data.model_dump(include={"resolution", "in_channels"})

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {
            "role": "classifier",
            "resolution": self.data.resolution,
            "noisy": self.noisy,
            "objective": self.process.objective(),
            "classes": list(classes),
        }


class ContrastiveTraining(Training):
    """Contrastive text-image encoder (CLIP; Radford et al., 2021); larger batches are a harder task."""

    network: networks.ContrastiveNetworkConfig
    text: TextConfig
    data: ShiftedData

    def _check(self) -> None:
        factor = self.network.patch_size * 2 ** (len(self.network.channel_mult) - 1)
        side, width, heads = self.data.resolution, self.text.text_dim, self.text.text_heads
        refuse(side % factor, f"resolution {side} must be a multiple of {factor}, of its patches and levels")
        refuse(width % heads, f"text_dim {width} must be a multiple of text_heads {heads}")

    @property
    def encoded_sizes(self) -> dict[str, int]:
        """Dimensions of image embeddings and of text states, for trainings on the encoded data."""
        return {"image_embedding_dim": self.network.embedding_dim, "text_states_dim": self.text.text_dim}

    def needs(self) -> TrainingNeeds:
        return TrainingNeeds(self.data.resolution, captions=True)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        """Arguments of both encoders. Raises ValueError for a data set without captions."""
        refuse(dataset_info.vocab_size == 0, "a contrastive encoder needs images with captions, and this set has none")
        own = super().network_arguments(dataset_info, grid)
        return own | {"resolution": self.data.resolution, "text": self.text.arguments(dataset_info)}

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {"role": "contrastive", "resolution": self.data.resolution}


class DiffusionPriorTraining(Training):
    """Diffusion prior of DALL-E 2 (Ramesh et al., 2022, section 2.2), over contrastive embeddings."""

    stage_version = 2  # attention in fp32 on a CPU

    network: networks.DiffusionPriorNetworkConfig
    process: DiscreteProcess = DiscreteProcess(prediction_type="sample", min_snr_gamma=None)
    conditioning: PriorConditions = PriorConditions()
    data: ImageData  # of the contrastive encoder, or larger

    def needs(self) -> TrainingNeeds:
        columns = ("image_embedding", *self.conditioning.conditions)
        return TrainingNeeds(self.data.resolution, columns=columns, captions=True)

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        return super().network_arguments(dataset_info, grid) | {
            "embedding_dim": dataset_info.image_embedding_dim,
            "text_length": dataset_info.text_states_length,
            "text_dim": dataset_info.text_states_dim,
        }

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        return {"role": "diffusion_prior", "objective": self.process.objective()}


def network_kind(training: object) -> str:
    """Kind of a training's network, the tag of the unions of trainings."""
    network = training.get("network") if isinstance(training, dict) else getattr(training, "network", None)
    return str(network.get("kind") if isinstance(network, dict) else getattr(network, "kind", None))


AnyPrior = Annotated[
    Annotated[PriorTraining, Tag("transformer")]
    | Annotated[MaskedPriorTraining, Tag("masked_transformer")]
    | Annotated[PixelTraining, Tag("pixelcnn")]
    | Annotated[PixelTraining, Tag("row_lstm")],
    Discriminator(network_kind),
]
AnyLoneModel = Annotated[
    Annotated[AutoencoderTraining, Tag("autoencoder")]
    | Annotated[PixelTraining, Tag("pixelcnn")]
    | Annotated[PixelTraining, Tag("row_lstm")]
    | Annotated[GANTraining, Tag("gan")],
    Discriminator(network_kind),
]


def check_guide(classifier: ClassifierTraining, base: DiffusionTraining) -> None:
    """Raises ValueError, naming the field, if images or noise of a guide and the base differ."""
    refuse(not classifier.noisy, "classifier.noisy must be true: it guides noisy images")
    for name in ("resolution", "in_channels"):
        value = getattr(base.data, name)
        refuse(getattr(classifier.data, name) != value, f"classifier.data.{name} must be base.data.{name} {value}")
    own, wanted = classifier.process.model_dump(), base.process.noise.model_dump()
    for name, value in wanted.items():
        refuse(own.get(name) != value, f"classifier.process.{name} must be base.process.{name} {value!r}")
