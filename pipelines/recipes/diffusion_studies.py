"""The shape of a recipe of one diffusion model and what is measured of it."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import DiffusionBranchSampling
from components.configuration.trainings import ClassifierTraining, check_guide
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.samples import SamplesConfig
from pipelines.recipes.checks import check_cascade


class DiffusionStudiesRecipe(Config):
    """A diffusion model with any of: its likelihood, its distance by sampler and steps, its guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    name: str
    images: ImagesConfig
    base: DiffusionTraining
    weaker: DiffusionTraining | None = None  # guides the base: smaller, or trained for fewer steps
    classifier: ClassifierTraining | None = None  # of noisy images, guides the base
    judge: ClassifierTraining | None = None  # of clean images, guides nothing
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    likelihood: LikelihoodConfig | None = None
    steps_study: StepsStudyConfig | None = None
    guidance_study: GuidanceStudyConfig | None = None
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _models_fit(self) -> Self:
        side, conditions = check_cascade(self.base, (), self.sampling), self.base.conditioning.conditions
        for name in ("weaker", "classifier", "judge"):
            model = getattr(self, name)
            if model is not None and model.data.resolution != side:
                raise ValueError(f"{name}.resolution must be base.resolution {side}")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least base.resolution {side}")
        if self.weaker is not None and self.weaker.conditioning.conditions != conditions:
            raise ValueError(f"weaker.conditions must be base.conditions {list(conditions)}")
        if self.classifier is not None:
            check_guide(self.classifier, self.base)
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        process = self.base.process
        if not isinstance(process, DiscreteProcess):
            if self.likelihood is not None:
                raise ValueError(f"likelihood needs base.process discrete, not {process.kind}")
            return self
        most = process.num_train_timesteps
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
        if "label" not in self.base.conditioning.conditions:
            raise ValueError("base.conditions must hold label: guidance_study asks for classes")
        return self
