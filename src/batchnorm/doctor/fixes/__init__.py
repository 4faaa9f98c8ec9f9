"""What each finding is repaired by: new values for tensors, or a change of a model."""
