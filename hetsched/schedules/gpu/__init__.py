"""How graphics processors compute the functions of a part."""
