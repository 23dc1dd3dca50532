"""What a model is: families, MLPs, checkpoints and their files."""
