"""Nano's base from scratch (autoencoder, vision encoder) and the recipe of all stages."""
