"""One diffusion model and what is measured of it: noising, likelihood, samplers by steps, guidance by scale."""

from typing import Any, Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import DiffusionBranchSampling
from components.configuration.trainings import ClassifierTraining, check_guide
from components.evaluation.guidance_study import GuidanceStudyConfig
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.steps_study import StepsStudyConfig
from components.stages.cascade import compose_cascade
from components.stages.classifier import train_classifier
from components.stages.diffusion import train_diffusion
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.likelihood import LikelihoodConfig, measure_likelihood
from components.stages.noising import study_noising
from components.stages.samples import SamplesConfig, sample_generators
from components.stages.studies import study_guidance, study_steps
from pipelines.recipes.checks import check_cascade, check_channels, check_weaker
from pipelines.workflow import Stage, Workflow


class DiffusionStudiesRecipe(Config):
    """A diffusion model with any of: noising, likelihood, distance by sampler and steps, guidance by scale."""

    workflow: Literal["diffusion_studies"] = "diffusion_studies"
    name: str
    images: ImagesConfig
    base: DiffusionTraining
    weaker: DiffusionTraining | None = None  # guides the base: smaller, or trained for fewer steps
    classifier: ClassifierTraining | None = None  # of noisy images, guides the base
    judge: ClassifierTraining | None = None  # of clean images, guides nothing
    sampling: DiffusionBranchSampling = DiffusionBranchSampling()
    samples: SamplesConfig
    noising_study: NoisingStudyConfig | None = None
    likelihood: LikelihoodConfig | None = None
    steps_study: StepsStudyConfig | None = None
    guidance_study: GuidanceStudyConfig | None = None
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _models_fit(self) -> Self:
        check_channels(self.base)
        side = check_cascade(self.base, (), self.sampling)
        for name in ("classifier", "judge"):
            model = getattr(self, name)
            if model is not None and model.data.resolution != side:
                raise ValueError(f"{name}.resolution must be base.resolution {side}")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least base.resolution {side}")
        if self.noising_study is not None and self.images.resolution < (self.noising_study.resolution or side):
            raise ValueError(f"noising_study.resolution must be at most images.resolution {self.images.resolution}")
        if self.weaker is not None:
            check_weaker(self.weaker, self.base)
        if self.classifier is not None:
            check_guide(self.classifier, self.base)
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        process = self.base.process
        if not isinstance(process, DiscreteProcess):
            for name in ("likelihood", "noising_study"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs base.process discrete, not {process.kind}")
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


def diffusion_studies(recipe: DiffusionStudiesRecipe) -> Workflow:
    """The base model, those that guide or judge it, and the studies that the recipe asks for."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    base = Stage("base", train_diffusion, recipe.base, images=images)
    helpers = {
        name: Stage(name, train, config, images=images, **inputs)
        for name, train, config, inputs in (
            ("weaker", train_diffusion, recipe.weaker, {}),
            ("classifier", train_classifier, recipe.classifier, {}),
            ("judge", train_classifier, recipe.judge, {}),
        )
        if config is not None
    }
    cascade = Stage("cascade", compose_cascade, recipe.sampling, base=base)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)

    wanted: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "noising_study": (study_noising, recipe.noising_study, {"model": base}),
        "likelihood": (measure_likelihood, recipe.likelihood, {"model": base}),
        "steps_study": (study_steps, recipe.steps_study, {"cascade": cascade}),
        "guidance_study": (study_guidance, recipe.guidance_study, {"base": base, **helpers}),
    }
    studies = [
        Stage(name, study, config, images=images, **models)
        for name, (study, config, models) in wanted.items()
        if config is not None
    ]
    return Workflow(recipe.name, [images, base, *helpers.values(), cascade, samples, *studies, evaluation])
