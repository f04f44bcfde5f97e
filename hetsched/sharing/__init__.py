"""Which runs of kernel groups devices share, along which axis and in which shares."""
