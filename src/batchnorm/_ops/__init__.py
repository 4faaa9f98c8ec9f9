"""The operator boundary: torch.library schemas, fakes and autograd. Torch only; no kernel is imported here."""
