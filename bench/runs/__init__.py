"""Benchmark runs: configurations, the store of rows, comparison of two stores."""
