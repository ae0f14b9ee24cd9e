"""The shape of a recipe of one diffusion model and what is measured of it."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration import Config
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.stages.cascade import CascadeConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.samples import SamplesConfig
from components.training.classifier_config import ClassifierConfig, check_guide
from components.training.config import DiffusionConfig


class DiffusionStudiesRecipe(Config):
    """A diffusion model with any of: its likelihood, its distance by sampler and steps, its guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    name: str
    images: ImagesConfig
    base: DiffusionConfig
    weaker: DiffusionConfig | None = None  # guides the base: smaller, or trained for fewer steps
    classifier: ClassifierConfig | None = None  # of noisy images, guides the base
    judge: ClassifierConfig | None = None  # of clean images, guides nothing
    cascade: CascadeConfig = CascadeConfig()
    samples: SamplesConfig
    likelihood: LikelihoodConfig | None = None
    steps_study: StepsStudyConfig | None = None
    guidance_study: GuidanceStudyConfig | None = None
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _models_fit(self) -> Self:
        if self.base.low_res_resolution is not None:
            raise ValueError("base.low_res_resolution must be empty: a base model starts from noise alone")
        for name in ("weaker", "classifier", "judge"):
            model = getattr(self, name)
            if model is not None and model.resolution != self.base.resolution:
                raise ValueError(f"{name}.resolution must be base.resolution {self.base.resolution}")
        if self.images.resolution < self.base.resolution:
            raise ValueError(f"images.resolution must be at least base.resolution {self.base.resolution}")
        if self.weaker is not None and self.weaker.conditions != self.base.conditions:
            raise ValueError(f"weaker.conditions must be base.conditions {list(self.base.conditions)}")
        if self.classifier is not None:
            check_guide(self.classifier, self.base)
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        if self.base.objective != "discrete":
            if self.likelihood is not None:
                raise ValueError(f"likelihood needs base.objective discrete, not {self.base.objective}")
            return self
        most = self.base.num_train_timesteps
        if self.likelihood is not None:
            count = self.likelihood.timesteps_per_image or most
            if not 2 <= count <= most:
                raise ValueError(f"likelihood.timesteps_per_image must be in [2, {most}], not {count}")
        asked: dict[str, int] = {}
        if self.steps_study is not None:
            asked["steps_study.steps"] = max(self.steps_study.steps)
            asked["steps_study.reference_steps"] = self.steps_study.reference_steps
        if self.guidance_study is not None:
            asked["guidance_study.num_inference_steps"] = self.guidance_study.num_inference_steps
        for name, steps in asked.items():
            if steps > most:
                raise ValueError(f"{name} must be at most base.num_train_timesteps {most}, not {steps}")
        return self

    @model_validator(mode="after")
    def _a_guidance_study_has_its_models(self) -> Self:
        if self.guidance_study is None:
            return self
        methods = self.guidance_study.methods
        needs = {
            "judge": True,
            "weaker": "autoguidance" in methods,
            "classifier": "classifier" in methods or "classifier_unconditional" in methods,
        }
        for name, needed in needs.items():
            if needed and getattr(self, name) is None:
                raise ValueError(f"{name} is missing: guidance_study.methods {list(methods)} need it")
        if "label" not in self.base.conditions:
            raise ValueError("base.conditions must hold label: guidance_study asks for classes")
        return self
