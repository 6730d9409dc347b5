"""Shards of images and latents: packing, indexing, reading and the order in which samples are dealt out."""
