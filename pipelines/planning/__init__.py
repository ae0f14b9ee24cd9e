"""Plans of a run before the start: shares of the cluster, memory, operations, price."""
