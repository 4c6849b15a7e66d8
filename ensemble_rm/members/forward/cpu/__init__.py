"""What CPUs alone use, imported when a model is put on one."""
