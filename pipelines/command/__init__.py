"""The `cascade` command, a file for each verb."""
