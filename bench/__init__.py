"""Benchmarks: each prints one table and writes one JSON file that says where it comes from."""
