"""What a run stands on: storage, tracking, events, the pool of workers, and the share of a machine."""
