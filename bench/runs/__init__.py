"""Benchmark runs: configurations, engines, the store of rows, comparison of two stores."""
