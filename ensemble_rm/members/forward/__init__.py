"""Forward passes: batches, shared prompts, kernels for CPUs."""
