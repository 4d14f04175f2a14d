"""What happens to a sweep when parts of it die: see ``python -m benchmarks.chaos --help``."""
