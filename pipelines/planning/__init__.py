"""What a run will take: shares of the cluster, memory, operations, price."""
