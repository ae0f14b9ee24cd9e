"""One training step of the demo's U-Net against other U-Nets with as many parameters, and its sampling; one thread.

diffusers' U-Net has the same architecture and the same number of parameters; that of denoising-diffusion-pytorch has
1.5 % more, with its own blocks and no classes. Sampling is 20 steps of DDIM without guidance, noise to images.
"""

import torch
from denoising_diffusion_pytorch import Unet
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import sample
from components.models.unet import UNet
from tests.benchmarks.interleaving import Step, interleaved

RESOLUTION, CHANNELS, CHANNEL_MULT, HEAD_DIM, NUM_CLASSES, BATCH = 16, 32, (1, 2, 4), 32, 9, 64
LUCIDRAINS_DIM = 36  # 3.26 million parameters, ours 3.21
SAMPLED, STEPS = 16, 20
FORMATS = (torch.channels_last, torch.contiguous_format)


def our_network(num_classes: int | None = NUM_CLASSES) -> UNet:
    return UNet(
        resolution=RESOLUTION,
        model_channels=CHANNELS,
        channel_mult=CHANNEL_MULT,
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=HEAD_DIM,
        num_classes=num_classes,
    )


def peer_network(num_classes: int | None = NUM_CLASSES) -> UNet2DModel:
    """The same architecture, so that both have the same number of parameters."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        layers_per_block=1,
        block_out_channels=tuple(CHANNELS * mult for mult in CHANNEL_MULT),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=HEAD_DIM,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def lucidrains_network() -> Unet:
    return Unet(LUCIDRAINS_DIM, dim_mults=CHANNEL_MULT)


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
    settings = {"kind": "discrete", "schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    objective = make_objective(settings)
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


def rows(rounds: int) -> list[dict[str, float | str]]:
    """Ours against each peer at the faster of its two memory formats, in fp32 and under bf16 autocast."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = [row for bf16 in (False, True) for row in training_rows(bf16=bf16, rounds=rounds)]
        steps = {"ours": our_sampling()} | {f"peer {memory}": peer_sampling(memory) for memory in FORMATS}
        return [*training, row("unet_sampling", interleaved(steps, rounds=rounds), peer="peer")]
    finally:
        torch.set_num_threads(before)


def training_rows(*, bf16: bool, rounds: int) -> list[dict[str, float | str]]:
    steps = {"ours": training_step(our_network(), "label", bf16=bf16)}
    for memory in FORMATS:
        how = {"bf16": bf16, "memory_format": memory}
        steps[f"diffusers {memory}"] = training_step(peer_network(), "class_labels", **how)
        steps[f"lucidrains {memory}"] = training_step(lucidrains_network(), None, **how)
    times, suffix = interleaved(steps, rounds=rounds), "_bf16" if bf16 else ""
    return [
        row(f"unet_step{suffix}", times, peer="diffusers"),
        row(f"unet_step_lucidrains{suffix}", times, peer="lucidrains"),
    ]


def row(name: str, times: dict[str, tuple[float, float]], *, peer: str) -> dict[str, float | str]:
    (ours, cpu_ours), (theirs, cpu_theirs) = times["ours"], min(times[side] for side in times if side.startswith(peer))
    seconds = {"ours": ours, "peer": theirs, "ratio": ours / theirs, "cpu_ours": cpu_ours, "cpu_peer": cpu_theirs}
    return {"name": name, "unit": "s"} | seconds
