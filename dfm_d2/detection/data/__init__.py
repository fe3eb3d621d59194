"""Data sets of images with boxes: readers, registration, augmentation, loaders, the generated set."""
