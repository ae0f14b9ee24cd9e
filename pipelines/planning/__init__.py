"""Plans of a run before it starts: shares of the cluster, memory, operations, price."""
