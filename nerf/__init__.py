"""The radiance field: scenes, cameras, networks, rendering, training, evaluation."""
