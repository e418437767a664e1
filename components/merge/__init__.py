"""Stage 2: the shards' router data as one unsharded run would have written it."""
