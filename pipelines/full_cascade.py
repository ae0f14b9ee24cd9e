"""The whole system on one screen, and a program: `ray job submit -- python pipelines/full_cascade.py`."""

from typing import Any

from components.stages.evaluate import evaluate, run_study, train_scene_judge
from components.stages.images import images_identity, ingest_images
from components.stages.samples import compose_cascade, sample_generators
from components.stages.tokens import tokenize_images
from components.stages.training import train_model
from pipelines.recipes.shapes import AgreementRecipe, CascadeRecipe, ObedienceRecipe
from pipelines.workflow import Stage, Workflow


def full_cascade(recipe: CascadeRecipe) -> Workflow:
    """Two generators: tokens (VQ-GAN, transformer prior) and diffusion (base, upsamplers)."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)

    tokenizer = Stage("tokenizer", train_model, recipe.tokenizer, images=images)
    tokens = Stage("tokens", tokenize_images, recipe.tokens, images=images, tokenizer=tokenizer)
    prior = Stage("prior", train_model, recipe.prior, tokens=tokens, tokenizer=tokenizer)

    base = Stage("base", train_model, recipe.base, images=images)
    upsamplers = [Stage(f"upsampler_{u.data.resolution}", train_model, u, images=images) for u in recipe.upsamplers]

    trained = [tokenizer, tokens, prior, base, *upsamplers]
    models: dict[str, Any] = {"tokenizer": tokenizer, "prior": prior, "base": base, "upsamplers": upsamplers}
    if recipe.reranker is not None:
        models["reranker"] = Stage("contrastive", train_model, recipe.reranker, images=images)
        trained.append(models["reranker"])

    cascade = Stage("cascade", compose_cascade, recipe.sampling, **models)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, tokenizer=tokenizer, samples=samples)
    judged = agreement_stages(recipe.agreement, images=images, cascade=cascade)
    judged += obedience_stages(recipe.obedience, images=images, cascade=cascade)

    return Workflow(recipe.name, [images, *trained, cascade, samples, evaluation, *judged])


def agreement_stages(recipe: AgreementRecipe | None, *, images: Stage, cascade: Stage) -> list[Stage]:
    """Networks that judge the cascade's images, and the networks' agreement; none without a recipe."""
    if recipe is None:
        return []
    trainings = {"judge": recipe.judge, "matcher": recipe.matcher}
    judges: dict[str, Any] = {
        name: Stage(name, train_model, own, images=images) for name, own in trainings.items() if own
    }
    measure = Stage("agreement", run_study, recipe.measure, images=images, cascade=cascade, **judges)
    return [*judges.values(), measure]


def obedience_stages(recipe: ObedienceRecipe | None, *, images: Stage, cascade: Stage) -> list[Stage]:
    """The judge of scenes, and what it reads of the cascade's images; none without a recipe."""
    if recipe is None:
        return []
    judge = Stage("scene_judge", train_scene_judge, recipe.judge)
    return [judge, Stage("obedience", run_study, recipe.measure, images=images, cascade=cascade, judge=judge)]


if __name__ == "__main__":
    from pipelines.command.cli import run_script

    run_script()
