"""A simulation of how blocks reach ranks: one process hands them to crews, a dealer of each crew to its ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dealing:
    """Seconds are CPU time on an idle core; reading is never what is waited for."""

    world_size: int
    crews: int  # as many as ranks: no dealers
    steps_per_block: int
    block_seconds: float  # the one process, for each block
    hand_seconds: float  # a dealer, for each block and rank; for the block itself as long as the one process

    def seconds_a_step(self, step_seconds: float, *, steps: int = 400) -> float:
        """Of all ranks in lockstep, from the first batch on: `step_seconds` if none ever waits."""
        size, dealers = self.world_size // self.crews, [0.0] * self.crews
        handed, now, begun = 0.0, 0.0, 0.0
        for block in range(steps // self.steps_per_block):
            for crew in range(self.crews):
                handed += self.block_seconds
                dealers[crew] = max(dealers[crew], handed)
                if size > 1:
                    dealers[crew] += self.block_seconds + size * self.hand_seconds
            now = max(now, *dealers)  # each step needs the slowest rank
            begun = begun if block else now
            now += self.steps_per_block * step_seconds
        return (now - begun) / (steps // self.steps_per_block * self.steps_per_block)
