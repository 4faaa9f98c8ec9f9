"""The paper's experiments, one file each; what they share is the training loop, the run folder and the claims."""
