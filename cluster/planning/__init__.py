"""Which shard goes on which device."""
