"""The highest rate within an SLO, from loads that somebody else sends: pure functions and state, no input or output."""
