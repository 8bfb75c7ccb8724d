"""What a change costs: the same clips with and without it, measured frame by frame, on one page."""
