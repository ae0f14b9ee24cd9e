"""Quality for equal CPU seconds: our small diffusion model against those of diffusers and denoising-diffusion-pytorch
on the same rendered scenes of 16², without conditions, one thread. Measured on request: it takes half an hour a round.

Networks have as many parameters (see `bench_unet`); batch, peak of the learning rate and AdamW are ours. All else is
each side's own: ours predicts v with min-SNR weights and decays the rate; diffusers predicts noise by its training
script's cosine rate and EMA; denoising-diffusion-pytorch predicts v on its sigmoid schedule, with its Trainer's decay.
A round is a seed. Each side samples by its deterministic DDIM of as many steps; a row has Fréchet distances by
EfficientNet-Lite0, whose floor is that of other scenes."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from components.data.sources.scenes import render, scene
from components.evaluation.features import FeatureExtractor, MeasureConfig
from components.evaluation.metrics import Gaussian, frechet_distance, gaussian_of
from components.models.diffusion.samplers import sample
from components.sampling.images import levels_to_uint8
from components.training.batches import to_batch
from components.training.optim import learning_rate
from pipelines.recipes import systems
from tests.benchmarks.bench_unet import LUCIDRAINS_DIM, RESOLUTION, SIZES, peer_network
from tests.benchmarks.interleaving import Row, one_thread, row
from tests.tiny_training import make_task

ON_REQUEST = True
SECONDS = 300  # of the processor, for each training
SCENES, SAMPLED, STEPS, AT_ONCE = 2048, 512, 50, 128
RATE = 1e-3
Draw = Callable[[int], np.ndarray]  # number of images -> uint8 (N, H, W, 3)


def rows(rounds: int) -> list[Row]:
    """Medians of the distances of all seeds, and the floor, which is the distance of scenes that nobody has seen."""
    with one_thread():
        images, extract = scenes(0, SCENES), FeatureExtractor(MeasureConfig())

        def measured(images: np.ndarray) -> Gaussian:
            return gaussian_of(extract(images)["features"])

        reference = measured(images)
        floor = frechet_distance(measured(scenes(SCENES, SAMPLED)), reference)
        sides = {"ours": ours, "diffusers": by_diffusers, "lucidrains": by_lucidrains}
        distances: dict[str, list[float]] = {name: [] for name in sides}
        for seed in range(rounds):
            for name, train in sides.items():
                torch.manual_seed(seed)
                made = train(images, seed)(SAMPLED)
                distances[name].append(frechet_distance(measured(made), reference))
                print(f"seed {seed} {name}: {distances[name][-1]:.1f}, floor {floor:.1f}", flush=True)
    own, *peers = (float(np.median(distances[name])) for name in sides)
    unit = f"distance after {SECONDS} s of CPU, floor {floor:.1f}"
    return [row(f"quality_{name}", own, peer, unit) for name, peer in zip(list(sides)[1:], peers, strict=True)]


def scenes(first: int, count: int) -> np.ndarray:
    """Renderings uint8 (N, H, W, 3)."""
    return np.stack([render(scene(number), resolution=RESOLUTION)[0] for number in range(first, first + count)])


def steps_for(step: Callable[[], object], seconds: float) -> int:
    """Number of such steps in so many CPU seconds; takes twelve of them."""
    for _ in range(2):
        step()
    begun = time.process_time()
    for _ in range(10):
        step()
    return math.ceil(seconds / (time.process_time() - begun) * 10)


def batches(images: np.ndarray, seed: int, size: int) -> Iterator[np.ndarray]:
    """Positions of a new order in each epoch."""
    numbers = np.random.default_rng(seed)
    while True:
        order = numbers.permutation(len(images))
        for first in range(0, len(order) - size + 1, size):
            yield order[first : first + size]


def ours(images: np.ndarray, seed: int) -> Draw:
    """The task of the rows' recipe, its average sampled by the product's DDIM."""
    recipe = systems.diffusion().replace(conditions=(), precision="fp32", seed=seed, learning_rate=RATE)
    size = recipe.optimization.global_batch_size

    def stepped(task: Any) -> Callable[[], object]:
        order, step = batches(images, seed, size), iter(range(1, 10**9))

        def take() -> None:
            number = next(step)
            positions = np.arange((number - 1) * size, number * size)
            task.train_step(to_batch({"image": images[next(order)], "position": positions}), number)

        return take

    steps = steps_for(stepped(make_task(recipe)), SECONDS)
    task = make_task(recipe.replace(total_steps=steps))
    take = stepped(task)
    for _ in range(steps):
        take()
    network = task.learner.snapshot().eval()

    @torch.inference_mode()
    def draw(count: int) -> np.ndarray:
        noise = torch.randn(count, 3, RESOLUTION, RESOLUTION).contiguous(memory_format=torch.channels_last)
        how = {"sampler": "ddim", "num_inference_steps": STEPS, "noise": lambda _: torch.empty(0)}
        return pixels(torch.cat([sample(network, task.objective, part, **how) for part in noise.split(AT_ONCE)]))

    return draw


def by_diffusers(images: np.ndarray, seed: int) -> Draw:
    """UNet2DModel in the step of diffusers' script of unconditional training."""
    scheduler, network = DDPMScheduler(), peer_network(None).to(memory_format=torch.channels_last)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def loss(x_0: Tensor) -> Tensor:
        noise, timesteps = torch.randn_like(x_0), torch.randint(1000, (len(x_0),))
        prediction = network(scheduler.add_noise(x_0, noise, timesteps), timesteps).sample
        return nn.functional.mse_loss(prediction, noise)

    train(network, loss, images, seed, after=lambda: average.step(network.parameters()))
    average.copy_to(network.parameters())
    pipeline = DDIMPipeline(network.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(count: int) -> np.ndarray:
        how = {"num_inference_steps": STEPS, "output_type": "np"}
        made = [pipeline(AT_ONCE, **how).images for _ in range(count // AT_ONCE)]
        return np.rint(255 * np.concatenate(made)).astype(np.uint8)

    return draw


def by_lucidrains(images: np.ndarray, seed: int) -> Draw:
    """Unet and GaussianDiffusion with their defaults, and the decay of their Trainer."""
    network = Unet(LUCIDRAINS_DIM, dim_mults=SIZES["channel_mult"])
    diffusion = GaussianDiffusion(network, image_size=RESOLUTION, sampling_timesteps=STEPS)
    average = torch.optim.swa_utils.AveragedModel(diffusion, multi_avg_fn=partial(lerped, decay=0.995))
    train(
        diffusion,
        lambda x_0: diffusion((x_0 + 1) / 2),
        images,
        seed,
        after=lambda: average.update_parameters(diffusion),
    )
    sampled: Any = average.module.eval()

    @torch.inference_mode()
    def draw(count: int) -> np.ndarray:
        made = [sampled.sample(batch_size=AT_ONCE) for _ in range(count // AT_ONCE)]
        return pixels(2 * torch.cat(made) - 1)

    return draw


def lerped(averages: Any, current: Any, count: object, *, decay: float) -> None:
    """An exponential moving average."""
    del count
    torch._foreach_lerp_(list(averages), list(current), 1 - decay)


def train(
    network: nn.Module, loss: Callable[[Tensor], Tensor], images: np.ndarray, seed: int, *, after: Callable[[], object]
) -> None:
    """Trains for the seconds, at a rate by cosine; the first steps, which count them, are taken back."""
    recipe = systems.diffusion().replace(learning_rate=RATE, lr_decay="cosine")
    size = recipe.optimization.global_batch_size
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def stepped(steps: int) -> Callable[[], None]:
        config = recipe.replace(total_steps=steps).optimization
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, fused=True)
        order, counted = batches(images, seed, size), iter(range(1, 10**9))

        def step() -> None:
            x_0 = torch.from_numpy(images[next(order)]).permute(0, 3, 1, 2).float() / 127.5 - 1
            loss(x_0).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, next(counted))
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = steps_for(stepped(10**6), SECONDS)
    network.load_state_dict(start)
    step = stepped(steps)
    for _ in range(steps):
        step()
        after()


def pixels(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] as uint8 (N, H, W, 3)."""
    return levels_to_uint8((images.clamp(-1, 1) + 1) * 127.5)
