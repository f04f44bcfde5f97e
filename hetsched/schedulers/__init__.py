"""Schedulers of task graphs: a file each, named on the command line by its file name."""
