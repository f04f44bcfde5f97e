"""OpenCL: the devices of this machine, and programs of launches that run on them."""
