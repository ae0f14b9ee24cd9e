"""Transfers of tensors to a device and of numbers back, without a wait of the host."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy the tensor to `device`, or return the tensor of `device` unchanged.

    A copy to an accelerator goes from pinned memory and in the order of the current stream: the host doesn't wait. From
    pageable memory the host would wait until the device has done all earlier work.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ToldLater:
    """Numbers of a device for a later look: the copy starts now, and has arrived by then."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=True)  # from a GPU torch makes it in pinned memory
        self.arrival: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def read(self) -> Tensor:
        """The tensor on the host, after a wait where the copy has not arrived yet."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy
