"""Training steps of U-Net and DiT, and sampling by the U-Net, ours beside diffusers.

Both sides learn the noise of images that are not compressed any further, with labels, by the mean square error; the
published networks learn a variance too. diffusers' DiT embeds time and label anew in each of its blocks.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.configuration.networks import DiTConfig
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import sample
from components.sampling.device import sampling_in
from components.training.learner import make_network
from components.training.parallel import Worker
from components.training.step_model import StepModel, counting
from components.training.tasks.diffusion import DiffusionTask
from pipelines.recipes.published_networks import LABEL, SIMPLE, UNCONDITIONAL, unet
from tests.benchmarks.gpu.case import Case, Side, bf16_on_gpu, counted, script_step, task_step
from tests.benchmarks.interleaving import Step
from tests.peer_unets import peer_unet as peers_unet

CLASSES = DatasetInfo(num_classes=1000)


class UNetSize(NamedTuple):
    resolution: int
    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    head_dim: int
    batch: int
    steps: int  # of sampling


class DiTSize(NamedTuple):
    resolution: int  # of latents
    model_dim: int
    num_layers: int
    num_heads: int
    batch: int


ADM_64 = UNetSize(64, 192, (1, 2, 3, 4), 3, (32, 16, 8), 64, batch=32, steps=50)
XL_2 = DiTSize(32, 1152, 28, 16, batch=32)


def unet_training(size: UNetSize, *, labels: bool = True) -> DiffusionTraining:
    about = (size.resolution, size.channels, size.channel_mult, size.num_res_blocks, size.attention_resolutions)
    conditioning = LABEL if labels else UNCONDITIONAL
    return unet(*about, size.head_dim, None, SIMPLE, conditioning, 540_000, size.batch, 3e-4, dropout=0.1)


def dit_training(size: DiTSize) -> DiffusionTraining:
    network = DiTConfig(model_dim=size.model_dim, num_layers=size.num_layers, num_heads=size.num_heads)
    latents = unet(size.resolution, 64, (1,), 1, (), 64, None, SIMPLE, LABEL, 400_000, size.batch, 1e-4, in_channels=4)
    return latents.replace(network=network.model_dump())


def peer_unet(size: UNetSize, *, labels: bool = True) -> UNet2DModel:
    classes = CLASSES.num_classes if labels else None
    return peers_unet(*size[:6], dropout=0.1, num_class_embeds=classes)


def peer_dit(size: DiTSize) -> DiTTransformer2DModel:
    heads = {"num_attention_heads": size.num_heads, "attention_head_dim": size.model_dim // size.num_heads}
    sizes = {"num_layers": size.num_layers, "sample_size": size.resolution, "patch_size": 2}
    return DiTTransformer2DModel(
        **heads, **sizes, in_channels=4, out_channels=4, num_embeds_ada_norm=CLASSES.num_classes
    )


def our_step(training: DiffusionTraining, device: torch.device, compiled: bool) -> Step:
    task = DiffusionTask(training.replace(compile_network=compiled), dataset_info=CLASSES, worker=Worker(device=device))
    shape = (training.optimization.global_batch_size, training.data.in_channels, *[training.data.resolution] * 2)
    label = torch.randint(CLASSES.num_classes, shape[:1], device=device)
    batch = {"image": torch.randn(shape, device=device), "label": label, "position": torch.arange(shape[0])}
    return task_step(task, batch)


def peer_step(make: partial[Any], batch: int, device: torch.device, compiled: bool) -> Step:
    """As diffusers' `train_unconditional.py`, with labels."""
    network, scheduler = make(), DDPMScheduler()
    channels, side = network.config.in_channels, network.config.sample_size
    x_0 = torch.randn(batch, channels, side, side, device=device)
    label = torch.randint(CLASSES.num_classes, (batch,), device=device)

    def loss(network: nn.Module) -> Tensor:
        noise, time = torch.randn_like(x_0), torch.randint(1000, (batch,), device=device)
        x_t = scheduler.add_noise(x_0, noise, time)
        with bf16_on_gpu(device):
            output = network(x_t, time, class_labels=label).sample
        return (output.float() - noise).square().mean()

    return script_step(network, loss, device=device, compiled=compiled, ema=True)


def unet_step(size: UNetSize = ADM_64) -> Case:
    return training_case("unet_step", unet_training(size), partial(peer_unet, size))


def dit_step(size: DiTSize = XL_2) -> Case:
    return training_case("dit_step", dit_training(size), partial(peer_dit, size))


def training_case(name: str, training: DiffusionTraining, make_peer: partial[Any]) -> Case:
    batch = training.optimization.global_batch_size
    model, peer = StepModel(training, CLASSES), partial(peer_step, make_peer, batch)
    ours = Side(partial(our_step, training), model.flops())
    return Case(name, batch, ours, Side(peer, counted(peer)), model)


def sampling(size: UNetSize = ADM_64) -> Case:
    """DDIM without guidance, noise to images."""
    ours = Side(partial(our_sampling, size), size.steps * forward_flops(partial(our_unet, size), size))
    peer = Side(partial(peer_sampling, size), size.steps * forward_flops(partial(peer_unet, size, labels=False), size))
    return Case("sampling", size.batch, ours, peer, in_a_row=1)


def our_unet(size: UNetSize) -> nn.Module:
    return make_network(unet_training(size, labels=False), CLASSES)


def our_sampling(size: UNetSize, device: torch.device, compiled: bool) -> Step:
    network = our_unet(size).eval().to(device, memory_format=torch.channels_last)
    objective = make_objective(SIMPLE.objective())
    if compiled:
        network.compile()
    shape = (size.batch, 3, size.resolution, size.resolution)

    def step() -> Tensor:
        noise = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        settings: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": size.steps, "noise": torch.empty}
        with sampling_in("bf16", device):
            return sample(network, objective, noise, **settings)

    return step


def peer_sampling(size: UNetSize, device: torch.device, compiled: bool) -> Step:
    """diffusers' own pipeline with weights in bf16; images as arrays, so that it encodes none."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = peer_unet(size, labels=False).eval().to(device, dtype, memory_format=torch.channels_last)
    if compiled:
        network.compile()
    pipeline = DDIMPipeline(network, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(size.batch, num_inference_steps=size.steps, output_type="np").images


def forward_flops(make: partial[Any], size: UNetSize) -> int:
    """Of a network of images for one batch."""
    with torch.device("meta"), counting() as counter, torch.no_grad():
        make().eval()(torch.randn(size.batch, 3, size.resolution, size.resolution), torch.zeros(size.batch))
    return counter.get_total_flops()
