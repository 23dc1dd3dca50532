"""What a neuron is worth: objectives, criteria, statistics, and the passes that sum them up."""
