"""Captions: what is known of an image (`metadata`) and what is visible in it (`visual`), in words."""
