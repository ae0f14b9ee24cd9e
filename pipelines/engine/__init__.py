"""Plan, execute, report."""
