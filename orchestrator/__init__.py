"""The sweep: from a YAML file to a Pareto report."""
