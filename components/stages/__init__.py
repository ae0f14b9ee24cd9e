"""One file a stage: its configuration and its run function."""
