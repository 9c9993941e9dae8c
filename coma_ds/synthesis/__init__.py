"""Dialogues for stage 1, written by a model that sees the images."""
