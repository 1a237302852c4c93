"""The files of a checkpoint folder: manifest, torch_dist, and the bytes in between."""
