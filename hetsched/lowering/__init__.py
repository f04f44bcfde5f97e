"""Graph-to-graph rewrites that a target applies for operations that its compiler lacks."""
