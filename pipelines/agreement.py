"""What a cascade's images are judged by: a classifier, a contrastive encoder, and the stage that asks them."""

from typing import Any, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.trainings import ClassifierTraining, ContrastiveTraining
from components.evaluation.agreement import AgreementConfig
from components.stages.agreement import measure_agreement
from components.stages.classifier import train_classifier
from components.stages.contrastive import train_contrastive
from pipelines.workflow import Stage


class AgreementRecipe(Config):
    """Two networks that have no part in making images: of labels the one judges, of prompts the other."""

    judge: ClassifierTraining | None = None  # of clean images
    matcher: ContrastiveTraining | None = None
    measure: AgreementConfig = AgreementConfig()

    @model_validator(mode="after")
    def _somebody_judges_finished_images(self) -> Self:
        if self.judge is None and self.matcher is None:
            raise ValueError("judge and matcher are missing: agreement needs one of them")
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    def check_size(self, made: int) -> None:
        """Raise ValueError, naming the field, for a network that sees larger images than are made."""
        for name in ("judge", "matcher"):
            model = getattr(self, name)
            if model is not None and model.data.resolution > made:
                raise ValueError(f"agreement.{name}.data.resolution must be at most {made}, what is made")


def agreement_stages(recipe: AgreementRecipe | None, *, images: Stage, cascade: Stage) -> list[Stage]:
    """The trainings, and what is measured with them; none without a recipe."""
    if recipe is None:
        return []
    judges = {}
    if recipe.judge is not None:
        judges["judge"] = Stage("judge", train_classifier, recipe.judge, images=images)
    if recipe.matcher is not None:
        judges["matcher"] = Stage("matcher", train_contrastive, recipe.matcher, images=images)
    inputs: dict[str, Any] = {"images": images, "cascade": cascade, **judges}
    return [*judges.values(), Stage("agreement", measure_agreement, recipe.measure, **inputs)]
