"""A run to its RunAnalysis, made once and saved; two of them to a comparison."""
