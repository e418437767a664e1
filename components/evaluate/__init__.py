"""Stage 4: held-out loss (and benchmark tasks) of the target model, with or without an adapter."""
