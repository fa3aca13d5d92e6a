"""Nano's base: autoencoder and vision encoder from scratch, and the recipe that joins all stages."""
