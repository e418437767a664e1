"""Stage 2, one shard: gate scores and expert distributions of the pool's rows."""
