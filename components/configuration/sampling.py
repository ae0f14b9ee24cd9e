"""Sampling defaults of trained models, part of the keys of cascade, samples and studies alone."""

from typing import Annotated, Literal

from pydantic import Field

from components.configuration.config import Config, Since, refuse
from components.configuration.optimization import Precision
from components.models.diffusion.steps import SAMPLERS, SamplerName, Spaced, check_spacing

SMALLEST, LARGEST = 1e-6, 1e9  # numbers but 0 that a model's float32 can multiply and divide by
NOISE_LEVEL = 100  # of an upsampler's low-res image, by default


class ModelSampling(Config):
    """Settings of a model without choices in sampling: a VAE, an encoder."""

    def _check(self) -> None:
        for name, value in self:
            far = isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST
            refuse(far, f"{name} must be of a size from {SMALLEST:g} to {LARGEST:g}, not {value}")


class DiffusionSampling(ModelSampling):
    """Settings of a base, an upsampler or an image-to-image model."""

    sampler: SamplerName = "ddim"
    num_inference_steps: int = Field(50, ge=1)
    eta: float = Field(0.0, ge=0, le=1)  # ddim
    spacing: Spaced | None = None  # a name, counts as "10,10,3,2,2", or steps; None: the sampler's
    threshold: Literal["static", "dynamic", "none"] = "static"  # of each predicted image; none is for latents
    threshold_percentile: float = Field(0.995, gt=0, le=1)  # dynamic
    # Of an upsampler: share of the steps it takes, from the low-res image.
    strength: Annotated[float, Since(1.0)] = Field(1.0, gt=0, le=1)
    noise_level: int | None = Field(None, ge=0)  # of the low-res image; None: 100, or the highest learned
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)  # 1 is no guidance
    autoguidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)  # away from the weaker model; 1: off
    guidance_interval: tuple[float, float] | None = None  # guide at these noise levels only, sigma / signal
    guidance_rescale: float = Field(0.0, ge=0, le=1)  # of the deviation, back to that without guidance
    guided_channels: Annotated[int | None, Since(None)] = Field(None, ge=1)  # the first, that guidance moves; None: all

    def _check(self) -> None:
        super()._check()
        if self.spacing is not None:
            check_spacing(self.spacing, self.num_inference_steps)
        if self.eta > 0 and SAMPLERS[self.sampler].own_eta is not None:
            takers = " or ".join(name for name, kind in SAMPLERS.items() if kind.own_eta is None)
            raise ValueError(f"eta belongs to sampler {takers}, not {self.sampler}")
        both, interval = self.autoguidance_scale != 1 != self.guidance_scale, self.guidance_interval
        refuse(both, "guidance_scale and autoguidance_scale don't go together: one of them must be 1")
        falls = interval is not None and not 0 <= interval[0] < interval[1]
        refuse(falls, f"guidance_interval must rise from at least 0, not {interval}")

    @property
    def steps_taken(self) -> int:
        """Number of last steps out of num_inference_steps; at least 1."""
        return max(1, round(self.strength * self.num_inference_steps))


class TokenSampling(ModelSampling):
    """Settings of a model with a draw for every value: a causal prior, a PixelCNN, a Row LSTM."""

    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)  # 1 is no guidance
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)


class TransformerSampling(TokenSampling):
    """Settings of a causal transformer."""

    compile_decoding: bool = False  # on a GPU: a minute more at first, then faster steps


class MaskedTokenSampling(TokenSampling):
    """Settings of a masked prior."""

    num_inference_steps: int = Field(12, ge=1)  # at most the tokens of an image
    choice_temperature: float = Field(4.5, ge=0)  # of the noise on what is kept first; the paper's


class GANSampling(ModelSampling):
    """Settings of a GAN's generator."""

    truncation: float | None = Field(None, gt=0, allow_inf_nan=False)  # greatest |z| of its noise; None: any


class DiffusionPriorSampling(ModelSampling):
    """Settings of DALL-E 2's diffusion prior."""

    sampler: SamplerName = "ddpm"
    num_inference_steps: int = Field(64, ge=1)
    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)  # 1 is no guidance
    candidates: int = Field(2, ge=1)  # as many are drawn, and the one nearest to the text is kept


class ClassifierSampling(ModelSampling):
    """Settings of a guiding classifier."""

    guidance_scale: float = Field(1.0, ge=0, allow_inf_nan=False)  # of its gradient; 0 is off


class RerankerSampling(ModelSampling):
    """Settings of a contrastive encoder as a judge of candidates (Ramesh et al., 2021, section 2.6)."""

    candidates: int = Field(1, ge=1)  # as many are drawn, and the one nearest to the text is kept


class SamplingConfig(Config):
    """Sampling of the models of a cascade, by role; models without a name leave nothing to choose."""

    precision: Precision = "bf16"  # of all of them, on GPUs; a CPU samples in fp32

    def by_model(self, upsamplers: tuple[str, ...] = ()) -> dict[str, dict[str, object]]:
        """Fields of each model by name, plain values; `upsamplers` names the larger models, smallest first."""
        found = self.model_dump(mode="json", exclude={"precision"})
        larger = zip(upsamplers, found.pop("upsamplers", ()), strict=True)
        return {name: fields for name, fields in [*found.items(), *larger] if fields is not None}


class TokenBranchSampling(SamplingConfig):
    """Sampling of a token branch."""

    prior: TokenSampling | TransformerSampling | MaskedTokenSampling = TokenSampling()
    reranker: RerankerSampling | None = None


class DiffusionBranchSampling(SamplingConfig):
    """Sampling of a diffusion branch."""

    diffusion_prior: DiffusionPriorSampling | None = None
    classifier: ClassifierSampling | None = None
    base: DiffusionSampling = DiffusionSampling()
    upsamplers: tuple[DiffusionSampling, ...] = ()


class CascadeSampling(SamplingConfig):
    """Sampling of a token branch and a diffusion branch together."""

    prior: TransformerSampling = TransformerSampling()
    reranker: Annotated[RerankerSampling | None, Since(None)] = None
    base: DiffusionSampling = DiffusionSampling()
    upsamplers: tuple[DiffusionSampling, ...] = ()


class RestorationSampling(SamplingConfig):
    """Sampling of an image-to-image model."""

    model: DiffusionSampling = DiffusionSampling()


class OneModelSampling(SamplingConfig):
    """Sampling of a model of pixels or a GAN; no other single model has choices."""

    model: TokenSampling | GANSampling | None = None
