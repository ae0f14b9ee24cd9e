"""One training step of the demo's U-Net against other U-Nets with as many parameters, and its sampling; one thread.

diffusers' U-Net has the same architecture and the same number of parameters; that of denoising-diffusion-pytorch has
1.5 % more, with its own blocks and no classes. Sampling is 20 steps of DDIM without guidance, noise to images.
"""

import torch
from denoising_diffusion_pytorch import Unet
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from components.models.diffusion.samplers import sample
from components.models.unet import UNet
from tests.benchmarks.interleaving import Row, Step, interleaved, one_thread, raced
from tests.known_denoisers import discrete
from tests.peer_unets import peer_unet

RESOLUTION, NUM_CLASSES, BATCH = 16, 9, 64
SIZES = {"resolution": RESOLUTION, "model_channels": 32, "channel_mult": (1, 2, 4), "num_res_blocks": 1}
SIZES |= {"attention_resolutions": (8, 4), "head_dim": 32}
LUCIDRAINS_DIM = 36  # 3.26 million parameters, ours 3.21
SAMPLED, STEPS = 16, 20
FORMATS = (torch.channels_last, torch.contiguous_format)


def our_network(num_classes: int | None = NUM_CLASSES) -> UNet:
    return UNet(**SIZES, num_classes=num_classes)


def peer_network(num_classes: int | None = NUM_CLASSES) -> UNet2DModel:
    rows = None if num_classes is None else num_classes + 1
    return peer_unet(**SIZES, num_class_embeds=rows, norm_num_groups=8, attn_norm_num_groups=8)


def training_step(
    network: nn.Module, label_name: str | None, *, bf16: bool, memory_format: torch.memory_format = torch.channels_last
) -> Step:
    """Forward, loss, backward and optimizer on random images; the optimizer is the fused one for both sides."""
    network = network.train().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    x_t = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION).to(memory_format=memory_format)
    timesteps = torch.randint(1000, (BATCH,))
    labels = {} if label_name is None else {label_name: torch.randint(NUM_CLASSES, (BATCH,))}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(x_t, timesteps, **labels)
        prediction = output if isinstance(output, Tensor) else output.sample
        (prediction.float() - x_t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_sampling() -> Step:
    network = our_network(None).eval().to(memory_format=torch.channels_last)
    objective = discrete()
    streams = [torch.Generator().manual_seed(seed) for seed in range(SAMPLED)]

    def step() -> None:
        noise = torch.stack([torch.randn(3, RESOLUTION, RESOLUTION, generator=stream) for stream in streams])
        noise = noise.contiguous(memory_format=torch.channels_last)
        made = sample(
            network, objective, noise, sampler="ddim", num_inference_steps=STEPS, noise=lambda _: torch.empty(0)
        )
        assert made.shape == (SAMPLED, 3, RESOLUTION, RESOLUTION)

    return step


def peer_sampling(memory_format: torch.memory_format) -> Step:
    """diffusers' own pipeline; images as arrays, so that it encodes none."""
    pipeline = DDIMPipeline(peer_network(None).eval().to(memory_format=memory_format), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    streams = [torch.Generator().manual_seed(seed) for seed in range(SAMPLED)]

    def step() -> None:
        made = pipeline(SAMPLED, generator=streams, num_inference_steps=STEPS, output_type="np").images
        assert made.shape == (SAMPLED, RESOLUTION, RESOLUTION, 3)

    return step


def rows(rounds: int) -> list[Row]:
    """Ours against each peer at the faster of its two memory formats, in fp32 and under bf16 autocast."""
    found = []
    with one_thread():
        for bf16, suffix in ((False, ""), (True, "_bf16")):
            steps = {"ours": training_step(our_network(), "label", bf16=bf16)}
            for memory in FORMATS:
                how = {"bf16": bf16, "memory_format": memory}
                steps[f"diffusers {memory}"] = training_step(peer_network(), "class_labels", **how)
                lucidrains = Unet(LUCIDRAINS_DIM, dim_mults=SIZES["channel_mult"])
                steps[f"lucidrains {memory}"] = training_step(lucidrains, None, **how)
            times = interleaved(steps, rounds=rounds)
            found.append(raced(f"unet_step{suffix}", times, peer="diffusers"))
            found.append(raced(f"unet_step_lucidrains{suffix}", times, peer="lucidrains"))
        steps = {"ours": our_sampling()} | {f"peer {memory}": peer_sampling(memory) for memory in FORMATS}
        found.append(raced("unet_sampling", interleaved(steps, rounds=rounds)))
    return found
