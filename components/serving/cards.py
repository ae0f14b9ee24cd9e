"""What a loaded cascade can do, as a card says it."""

from typing import Any

from components.sampling.cascade import Cascade
from components.sampling.generator import Generator
from components.sampling.model import reads_prompts
from components.serving.messages import Card, GeneratorCard


def card_of(cascade: Cascade, *, name: str, source: str, version: str, created: int) -> Card:
    """The card of a cascade by the name that it is served by."""
    generators = tuple(generator_card(maker) for maker in cascade.makers.values())
    return Card(name, source, version, created, generators)


def generator_card(maker: Generator) -> GeneratorCard:
    """What requests of one generator may say."""
    height, width = maker.size
    sampling, seen = maker.first.sampling.model_dump(), maker.condition_images
    return GeneratorCard(
        name=maker.name,
        title=maker.title,
        options=maker.options,
        classes=tuple(maker.classes),
        reads_prompts=reads_prompts(maker.first),
        shows_steps=maker.shows_steps,
        width=width,
        height=height,
        steps=sampling.get("num_inference_steps"),
        most_steps=most_steps(maker) if "num_inference_steps" in sampling else None,
        sampling={model.name: model.sampling.model_dump(mode="json") for model in maker.models},
        tasks=maker.tasks,
        condition_side=None if seen is None else seen.resolution,
    )


def most_steps(maker: Generator) -> int | None:
    """Steps of training of its first model, or the tokens that a masked prior has to choose; None: any number."""
    objective: dict[str, Any] = maker.first.settings.get("objective", {})
    return objective.get("num_train_timesteps") or maker.first.network.get("num_tokens")
