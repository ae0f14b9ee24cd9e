"""Where a trained model works when nothing else is said, and whether bf16 is worth it there."""

import torch

BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions that multiply: two sets of x86, and that of Arm


def best_device() -> torch.device:
    """A GPU where torch can use one, else the processor; `CUDA_VISIBLE_DEVICES=` in the environment hides every GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 by itself. One that emulates it takes about three times as long as in fp32.

    On processors it is oneDNN that multiplies. Where torch (before 2.11) doesn't say what a processor has, it has none.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.backends.mkldnn.is_available() and any(capabilities.get(name, False) for name in BF16)
    return True
