"""Figures, tables and the HTML page, drawn from saved runs."""
