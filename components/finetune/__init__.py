"""Stage 3: the target model fine-tuned (LoRA) on one arm's rows with one seed."""
