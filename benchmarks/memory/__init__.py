"""KV memory: the arena beside static reservation, 16-token paging and the vAttention paper."""
