"""Foundations of a run: storage, tracking, events, the pool of workers, the machine's shares."""
