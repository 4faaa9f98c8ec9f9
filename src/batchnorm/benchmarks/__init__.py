"""How fast the layers are here, against torch and JAX: cases, peers, interleaved timing, tables."""
