"""Unpaired image-to-image translation by latent energy transport (LETIT, arXiv 2012.00649)."""

__version__ = "0.1.0"
