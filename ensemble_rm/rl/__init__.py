"""RL loops: rewards for their trainers, the KL penalty, and a monitor of over-optimisation."""
