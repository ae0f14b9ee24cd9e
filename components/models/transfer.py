"""Tensors that go from the host to a device, and numbers that come back, without the host waiting for the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; itself where it is there already.

    To an accelerator it goes from pinned memory and in the order of the current stream: the host doesn't wait. From
    pageable memory it would, until the device has done all that it was told before.
    """
    device = torch.device(device)
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ToldLater:
    """Numbers of a device that the host looks at later: their copy starts now, and by then has long arrived."""

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
        """The tensor on the host. Waits where it has not arrived yet."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy
