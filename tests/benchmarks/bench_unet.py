"""One training step of the demo's U-Net against that of diffusers with as many parameters, each on one thread."""

import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from components.models.unet import UNet

RESOLUTION, CHANNELS, CHANNEL_MULT, HEAD_DIM, NUM_CLASSES, BATCH = 16, 32, (1, 2, 4), 32, 9, 64
WARM_UP = 2

Step = Callable[[], None]


def our_network() -> nn.Module:
    return UNet(
        resolution=RESOLUTION,
        model_channels=CHANNELS,
        channel_mult=CHANNEL_MULT,
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_dim=HEAD_DIM,
        num_classes=NUM_CLASSES,
    )


def peer_network() -> nn.Module:
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
        num_class_embeds=NUM_CLASSES + 1,
    )


def training_step(
    network: nn.Module, label_name: str, *, bf16: bool, memory_format: torch.memory_format = torch.channels_last
) -> Step:
    """Forward, loss, backward and optimizer on random pictures; the optimizer is the fused one for both sides."""
    network = network.train().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    x_t = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION).to(memory_format=memory_format)
    timesteps, label = torch.randint(1000, (BATCH,)), torch.randint(NUM_CLASSES, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = network(x_t, timesteps, **{label_name: label})
        prediction = output if isinstance(output, Tensor) else output.sample
        (prediction.float() - x_t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step) -> tuple[float, float]:
    """Wall-clock and processor seconds of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleaved(steps: dict[str, Step], *, rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall-clock and processor seconds of each, one step of each in turn, so that all see the same machine."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    return {name: (median(wall for wall, _ in t), median(cpu for _, cpu in t)) for name, t in times.items()}


def rows(rounds: int) -> list[dict[str, float | str]]:
    """Ours against the peer at the faster of its two memory formats, in fp32 and under bf16 autocast."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row("unet_step", bf16=False, rounds=rounds), row("unet_step_bf16", bf16=True, rounds=rounds)]
    finally:
        torch.set_num_threads(before)


def row(name: str, *, bf16: bool, rounds: int) -> dict[str, float | str]:
    steps = {
        "ours": training_step(our_network(), "label", bf16=bf16),
        "channels_last": training_step(peer_network(), "class_labels", bf16=bf16),
        "contiguous": training_step(peer_network(), "class_labels", bf16=bf16, memory_format=torch.contiguous_format),
    }
    times = interleaved(steps, rounds=rounds)
    (ours, cpu_ours), (peer, cpu_peer) = times["ours"], min(times["channels_last"], times["contiguous"])
    seconds = {"ours": ours, "peer": peer, "ratio": ours / peer, "cpu_ours": cpu_ours, "cpu_peer": cpu_peer}
    return {"name": name, "unit": "s"} | seconds
