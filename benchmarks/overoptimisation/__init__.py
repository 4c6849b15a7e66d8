"""What best-of-n and GRPO do to a gold reward, under one head and under ensembles."""
