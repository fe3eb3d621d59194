"""What both verticals need of data: reports of what is broken, sample streams, files, images."""
