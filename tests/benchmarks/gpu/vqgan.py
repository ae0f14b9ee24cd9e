"""A training step of VQ-GAN, ours beside diffusers' VQModel in the step of `make bench`, without perceptual features.

Both sides have the same discriminator, hinge losses and adaptive weight, and learn their codes by gradient.
"""

from functools import partial
from typing import NamedTuple

import torch
from diffusers import VQModel

from components.configuration.trainings import AutoencoderTraining
from components.models.critics import PatchDiscriminator
from components.training.parallel import Worker
from components.training.step_model import StepModel
from components.training.tasks.autoencoder import AutoencoderTask
from tests.benchmarks.bench_vqgan import Peer, peer_model, training_step
from tests.benchmarks.gpu.case import Case, MakeStep, Side, counted
from tests.benchmarks.gpu.tokens import LONG
from tests.benchmarks.interleaving import Step


class VQGANSize(NamedTuple):
    resolution: int
    channels: int
    channel_mult: tuple[int, ...]  # attention at the lowest resolution
    num_res_blocks: int
    norm_groups: int
    latent_channels: int
    codebook_size: int
    discriminator_channels: int
    batch: int


F16 = VQGANSize(256, 128, (1, 1, 2, 2, 4), 2, 32, 256, 1024, 64, batch=8)


def vqgan_training(size: VQGANSize) -> AutoencoderTraining:
    sizes = size._asdict()
    bottleneck = {"kind": "vq", "codebook_size": sizes.pop("codebook_size"), "codebook_dim": None}
    sizes |= {"attention_resolutions": (size.resolution >> (len(size.channel_mult) - 1),), "perceptual_network": "none"}
    sizes |= {"bottleneck": bottleneck | {"l2_normalize": False}, "global_batch_size": sizes.pop("batch")}
    return AutoencoderTraining.of(**sizes, learning_rate=1e-4, **LONG)


def our_step(size: VQGANSize, device: torch.device, compiled: bool) -> Step:
    training = vqgan_training(size).replace(compile_network=compiled)
    task = AutoencoderTask(training, worker=Worker(device=device))
    batch = {"image": images(size, device), "position": torch.arange(size.batch)}
    steps = iter(range(1, training.optimization.total_steps))
    return lambda: task.train_step(batch, next(steps))


def peer_network(size: VQGANSize) -> VQModel:
    sizes = {"latent_channels": size.latent_channels, "vq_embed_dim": size.latent_channels}
    sizes |= {"num_vq_embeddings": size.codebook_size, "norm_num_groups": size.norm_groups}
    return peer_model(size.channels, size.channel_mult, layers_per_block=size.num_res_blocks, **sizes)


def peer_step(size: VQGANSize, device: torch.device, compiled: bool) -> Step:
    tokenizer, discriminator = Peer(peer_network(size)), PatchDiscriminator(channels=size.discriminator_channels)
    for module in (tokenizer, discriminator):
        module.to(device, memory_format=torch.channels_last)
    if compiled:
        tokenizer.model.compile()
        discriminator.compile()
    about = {"bf16": device.type == "cuda", "fused": device.type != "meta"}
    return training_step(tokenizer, images(size, device), discriminator=discriminator, perceptual=None, **about)


def images(size: VQGANSize, device: torch.device) -> torch.Tensor:
    image = torch.rand(size.batch, 3, size.resolution, size.resolution, device=device).mul_(2).sub_(1)
    return image.contiguous(memory_format=torch.channels_last)


def vqgan_step(size: VQGANSize = F16) -> Case:
    peer: MakeStep = partial(peer_step, size)
    model = StepModel(vqgan_training(size))
    ours = Side(partial(our_step, size), model.flops())
    return Case("vqgan_step", size.batch, ours, Side(peer, counted(peer)), model)
