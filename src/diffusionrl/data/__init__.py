"""Prompts, image-text pairs, and images in and out."""
