"""What happens when a loss or gradient is not finite: one such step is skipped, several in a row stop the stage."""

from torch import Tensor

PATIENCE = 5  # consecutive steps


class NonFiniteError(RuntimeError):
    """Training or its weights left the finite numbers; the message says what to try."""


class NonFiniteGuard:
    """Counts consecutive non-finite steps. All ranks see the same averaged gradient norm, so all decide the same."""

    def __init__(self) -> None:
        self.consecutive = 0

    def admits(self, norm: Tensor, *, step: int) -> bool:
        """Whether the update of `step` may be taken. Raises NonFiniteError after PATIENCE refusals in a row.

        Reading `norm` waits for the device once a step: the price of never applying a bad update.
        """
        if bool(norm.isfinite()):
            self.consecutive = 0
            return True
        self.consecutive += 1
        if self.consecutive >= PATIENCE:
            raise NonFiniteError(
                f"loss or gradient was not finite for {PATIENCE} steps in a row, the last being {step}; try a lower "
                "learning_rate, a longer warmup_steps, a smaller max_grad_norm or precision: fp32 "
                "(the last good checkpoint is kept)"
            )
        return False
