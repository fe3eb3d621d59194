"""Data sets of images with one label: sources, registration, loaders."""
