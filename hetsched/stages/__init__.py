"""Stages of a graph: for a pipeline, or one after the other; shared by layer-wise partitioners."""
